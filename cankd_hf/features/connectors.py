"""Projects a student's feature map to the teacher's channels and brings both to one grid."""

from torch import Tensor, nn

from cankd_hf.config.distill import GRIDS
from cankd_hf.errors import InputError
from cankd_hf.features.grids import resize_map
from cankd_hf.features.taps import Level


class Connector(nn.Module):
    """Projects the student's channels to the teacher's with a 1x1 convolution and brings both maps to one grid.

    The convolution (no norm, no activation) exists only where the channels differ, or `always`. It runs on the smaller
    of the two grids: it commutes with the resize, whose weights sum to one at every cell.

    Args:
        student: the student's level.
        teacher: the teacher's level.
        grid: whose grid both maps are resized to: "teacher", "student", "finer" (more cells) or "coarser".
        always: project equal channels too: one map cannot be equal to those of two teachers.

    Raises:
        InputError: for any other grid.
    """

    def __init__(self, student: Level, teacher: Level, grid: str = "finer", always: bool = False) -> None:
        super().__init__()
        if grid not in GRIDS:
            raise InputError(f"distill.grid: expected one of {', '.join(GRIDS)}, got {grid!r}")
        self.grid = grid
        self.projection: nn.Module = nn.Identity()
        if always or student.channels != teacher.channels:
            self.projection = nn.Conv2d(student.channels, teacher.channels, kernel_size=1)

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
        """Connects the maps `[B, C_s, H, W]` and `[B, C_t, h, w]`. Returns the student's and the teacher's map on one
        grid, both with C_t channels; the teacher's values are only resized."""
        ours = (student_map.shape[-2], student_map.shape[-1])
        theirs = (teacher_map.shape[-2], teacher_map.shape[-1])
        student_is_finer = ours[0] * ours[1] >= theirs[0] * theirs[1]
        to_student = self.grid == "student" or (self.grid != "teacher" and student_is_finer == (self.grid == "finer"))
        size = ours if to_student else theirs
        if size[0] * size[1] < ours[0] * ours[1]:
            student_map = self.projection(resize_map(student_map, size))
        else:
            student_map = resize_map(self.projection(student_map), size)
        return student_map, resize_map(teacher_map, size)

    def extra_repr(self) -> str:
        return f"grid={self.grid}"
