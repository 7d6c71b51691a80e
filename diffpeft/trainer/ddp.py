"""DistributedDataParallel around a model whose parameters are replaced: its reducer must be made again for them."""

from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


def common_seed() -> int:
    """The first rank's seed of torch's generator: with it all ranks draw the same noise, whatever else they draw."""
    seeds = [torch.initial_seed()]
    distributed.broadcast_object_list(seeds)
    return seeds[0]


class DDPFinder:
    """Finds the wrapper that runs a model, which callbacks are not given, and rebuilds it in place."""

    def __init__(self) -> None:
        self._ddp: DistributedDataParallel | None = None
        self._handle: RemovableHandle | None = None

    def watch(self, model: nn.Module) -> None:
        """Note the wrapper whenever it runs `model`."""
        self.stop()

        def note(*_: Any) -> None:
            active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
            self._ddp = active or self._ddp  # an evaluation runs the model without its wrapper

        self._handle = model.register_forward_pre_hook(note)

    def stop(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._ddp = None

    def rebuild(self) -> None:
        """Build the wrapper, if there is one, again in place for the parameters that the model has now.

        Its constructor also checks that all ranks have the same parameters and gives them rank 0's values.
        """
        if (ddp := self._ddp) is None:
            return
        DistributedDataParallel.__init__(
            ddp,
            ddp.module,
            device_ids=ddp.device_ids,
            output_device=ddp.output_device,
            dim=ddp.dim,
            broadcast_buffers=ddp.broadcast_buffers,
            process_group=ddp.process_group,
            find_unused_parameters=ddp.find_unused_parameters,
            gradient_as_bucket_view=ddp.gradient_as_bucket_view,
            static_graph=ddp.static_graph,
        )
