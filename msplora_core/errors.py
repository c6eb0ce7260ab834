"""The error that bad input raises."""

from msplora_core.names import printable

_LONGEST = 1500  # letters of a message
_LONGEST_REASON = 200


class TrainingError(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, expected, what to do.

    Texts of a file may hold anything: they are made ``printable``, and cut if endless.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))


def reason_of(error: BaseException) -> str:
    """What a library says is wrong, in one line of bounded length.

    Without PyTorch's advice on how to run the code of a file all the same.
    """
    text = " ".join(str(error).split())
    if "weights_only" in text or "Weights only" in text:
        return "its weights are a pickle that asks for more than tensors; save them as safetensors"
    return text[:_LONGEST_REASON] or type(error).__name__
