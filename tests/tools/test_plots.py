"""The picture of a diff."""

from architectures import ARCHITECTURES, pruned

from diffpeft.tools import plot_density


def test_models_with_two_stacks_of_layers_are_drawn(tmp_path):
    for name in ("clip", "t5"):
        model = pruned(ARCHITECTURES[name].make())
        plot_density(model.base_model, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
