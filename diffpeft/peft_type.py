"""A member of PEFT's `PeftType` for a method that does not ship with PEFT.

`register_peft_method` takes only members of the enumeration and transformers reads `peft_type.value`, so a string does
not do; an enumeration with members cannot be subclassed, so the member is added to it.
"""

from peft.utils import PeftType

MEMBER = "DIFFPRUNING"


def _member() -> PeftType:
    """`PeftType.DIFFPRUNING`, added on the first call."""
    if MEMBER not in PeftType.__members__:
        member = str.__new__(PeftType, MEMBER)
        member._name_ = MEMBER
        member._value_ = MEMBER
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        type.__setattr__(PeftType, MEMBER, member)
        PeftType._member_names_.append(MEMBER)
        PeftType._member_map_[MEMBER] = member
        PeftType._value2member_map_[MEMBER] = member
    return PeftType[MEMBER]


DIFFPRUNING = _member()
