"""Edit sessions on diffusers pipelines."""

from fisedit_compile.pipelines.masks.finding import AutomaticMask
from fisedit_compile.pipelines.picture import Picture
from fisedit_compile.pipelines.report import Report, SeamError
from fisedit_compile.pipelines.session import EditSession

__all__ = ["AutomaticMask", "EditSession", "Picture", "Report", "SeamError"]
