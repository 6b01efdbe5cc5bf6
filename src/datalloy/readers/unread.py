"""What a trainer would act on and Datalloy does not: refused by name, because to ignore it would train on other data.

Every answer of a conversation is supervised, all tokens alike, and nothing else is. Flags of ms-swift (`loss`,
`loss_scale`), axolotl (`train`, `train_detail`) and OpenAI (`weight`) that say so are accepted, all others are not.
Tools and boxes (`tools`, `tool_calls`, ms-swift's `objects`) change the prompt in ways that only their trainer knows.
"""

from typing import Any

from datalloy.readers.records import RecordError, shown
from datalloy.sample import Role

LOSS_KEYS = ("loss", "train", "weight", "loss_scale")
RECORD_KEYS = ("tools", "objects")
TURN_KEYS = ("tool_calls", "train_detail", "training_detail")


def refuse_unread(fields: dict[str, Any]) -> None:
    """Raises RecordError for keys of a record that change what is trained on, unless they are empty."""
    if key := next((key for key in RECORD_KEYS if fields.get(key)), None):
        raise RecordError("unsupported_key", f"found {key!r} with {shown(fields[key])}; remove it, or the record")


def refuse_unread_in_turn(message: dict[str, Any], role: Role) -> None:
    """Raises RecordError for a turn that is to be trained on in another way than all answers are."""
    if key := next((key for key in TURN_KEYS if message.get(key)), None):
        raise RecordError("unsupported_key", f"found {key!r} in a turn of the {role}; it cannot be read")
    for key in LOSS_KEYS:
        if (flag := message.get(key)) is not None and flag != (role == "assistant"):
            raise RecordError(
                "loss_flag",
                f"a turn of the {role} has {key!r}: {shown(flag)}; answers are trained on, whole, and nothing else is: "
                "split the conversation, or remove the flag",
            )
