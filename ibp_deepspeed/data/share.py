"""Which samples of a global micro-batch a data-parallel rank reads."""

from dataclasses import dataclass

from ibp_deepspeed.errors import DataError


@dataclass(frozen=True)
class Share:
    """Global micro-batch b is entries b·B·R … of some order of samples; each of R ranks has B of them.

    Attributes:
        micro_batch_size: B, samples.
        data_parallel_rank: 0 … R-1.
        data_parallel_size: R.

    Raises:
        DataError: one of them is out of range.
    """

    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __post_init__(self) -> None:
        at_least("micro_batch_size", self.micro_batch_size, 1)
        at_least("data_parallel_size", self.data_parallel_size, 1)
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise DataError(
                f"data_parallel_rank is {self.data_parallel_rank} of data_parallel_size {self.data_parallel_size}: "
                f"give a rank from 0 to {self.data_parallel_size - 1}"
            )

    @property
    def global_size(self) -> int:
        """Samples of a global micro-batch, B·R."""
        return self.micro_batch_size * self.data_parallel_size

    def entries(self, global_micro_batch: int) -> slice:
        """This rank's entries of the order."""
        first = global_micro_batch * self.global_size + self.data_parallel_rank * self.micro_batch_size
        return slice(first, first + self.micro_batch_size)


def at_least(name: str, value: int, lowest: int) -> None:
    """Raises a DataError that names the argument when its value is below ``lowest``."""
    if value < lowest:
        raise DataError(f"{name} is {value}: give {lowest} or more")
