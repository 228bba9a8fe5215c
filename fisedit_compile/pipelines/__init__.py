"""Edit sessions on diffusers pipelines."""

from fisedit_compile.errors import MissingPackageError

try:
    from fisedit_compile.pipelines.masks.differences import difference_mask
    from fisedit_compile.pipelines.masks.settings import AutomaticMask
    from fisedit_compile.pipelines.picture import Picture
    from fisedit_compile.pipelines.probing.search import FoundMask
    from fisedit_compile.pipelines.report import MaskCost, Report, SeamError
    from fisedit_compile.pipelines.session import EditSession
except ModuleNotFoundError as error:
    raise MissingPackageError(error.name or str(error), "edit sessions") from error

__all__ = [
    "AutomaticMask",
    "EditSession",
    "FoundMask",
    "MaskCost",
    "Picture",
    "Report",
    "SeamError",
    "difference_mask",
]
