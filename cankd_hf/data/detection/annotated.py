"""Images of a folder with their objects."""

from collections.abc import Sequence
from dataclasses import dataclass

from cankd_hf.data.common.dataset import Known
from cankd_hf.data.common.decode import Sample, Unusable, WrongLabels
from cankd_hf.data.common.folders import FolderSource
from cankd_hf.data.detection.objects import Annotation, fit_to_image, size_problem
from cankd_hf.data.detection.table import AnnotationTable


@dataclass(eq=False)
class AnnotatedSource(FolderSource):
    """Images of a folder with their objects; `skip` leaves out unusable boxes instead of refusing their image."""

    annotations: AnnotationTable
    skip: bool
    bare: Sequence[int] = ()  # images of which nobody said what they show

    def without_labels(self) -> tuple[FolderSource, list[int]]:
        return self.alone(), list(self.bare)

    def known(self, indices: Sequence[int]) -> Known:
        return self.annotations.known(indices)

    def load(self, index: int) -> Sample:
        return with_objects(super().load(index), self.annotations[index], self.skip)


def with_objects(sample: Sample, annotation: Annotation, skip: bool) -> Sample:
    """Add objects to a decoded image. Raises WrongLabels for an unknown category. Raises Unusable naming the boxes
    that cannot be used, and a wrong size in the metadata; with `skip` only if no box of the image can be used."""
    if annotation.wrong:
        raise WrongLabels(annotation.wrong)
    height, width = sample.image.shape[-2:]
    objects = fit_to_image(annotation, height, width, sample.name)
    problems = [] if skip and len(objects.boxes) else list(objects.dropped)
    if not skip and (wrong_size := size_problem(annotation, height, width, sample.name)):
        problems.append(wrong_size)
    if problems:
        raise Unusable(problems)
    return sample._replace(target=objects, dropped=objects.dropped + objects.empty)
