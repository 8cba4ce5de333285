"""ImageNet weights for the backbone: torchvision's, timm's or detectron2's names."""

from torch import Tensor

from d2zero.checkpoints.fit import check_compatible
from d2zero.checkpoints.published import our_name
from d2zero.model.backbone import Backbone

_CLASSIFIER = ("fc.", "stem.fc.", "head.", "classifier.")  # the ImageNet classifier has no use here


def is_backbone_only(arrays: dict[str, Tensor]) -> bool:
    """Whether these are weights of an image classifier and not of a whole D2Zero model."""
    return not any(name.startswith(("sem_seg_head.", "decoder.")) for name in arrays)


def load_backbone(backbone: Backbone, arrays: dict[str, Tensor]) -> int:
    """Copy ImageNet weights into a backbone, every array of it; returns how many.

    Raises:
        D2ZeroError: Lists each array that is missing, unexpected or misshapen.
    """
    state = backbone.net.state_dict()
    wanted = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    translated: dict[str, Tensor] = {}
    unexpected = []
    for name, array in arrays.items():
        if name.startswith(_CLASSIFIER) or name.endswith("num_batches_tracked"):
            continue
        ours = _backbone_name(name)
        if ours in wanted:
            translated[ours] = array.float()
        else:
            unexpected.append(name)
    check_compatible("the weights do not fit the backbone", wanted, translated, unexpected)
    backbone.net.load_state_dict(translated, strict=False)
    return len(translated)


def _backbone_name(name: str) -> str:
    """Timm's and torchvision's names are ours; detectron2's are translated."""
    published = name if name.startswith("backbone.") else f"backbone.{name}"
    return (our_name(published) or name).removeprefix("backbone.net.")
