"""Plans for one device: what fits now, by forecast and free memory, and why something does not."""

from dataclasses import dataclass, replace

from app.engine.cache import ModelCache
from app.engine.compute import OUTPUTS
from app.engine.forecast import Forecaster, NetworkShape, network_shape
from app.engine.jobs import Task, picture_pixels
from app.engine.memory import DeviceMemory
from app.engine.planning import ExecutionPlan, after, candidates, choose, dtypes
from app.engine.verdicts import Verdicts
from app.errors import InvalidParameter, OutOfMemory
from app.store.checkpoint import Checkpoint
from app.terms import Dtype, Fp16, Op, Precision


@dataclass(frozen=True)
class PlanAnswer:
    """What would happen to a picture of some size now. Bytes of working memory, weights not included."""

    device: str
    plan: str | None  # None: does not fit
    forecast_bytes: int | None
    free_bytes: int
    available_bytes: int  # with idle models evicted
    plans: dict[str, int]


@dataclass(frozen=True)
class Choice:
    """A plan, its forecast peak in bytes, and whether it is what an empty device would do with all items at once."""

    plan: ExecutionPlan
    peak: int
    first: bool = False


@dataclass(frozen=True)
class Planner:
    """Joins the arithmetic of `planning` with one device's memory and cache."""

    device: str  # cpu | cuda
    memory: DeviceMemory
    cache: ModelCache
    forecaster: Forecaster
    verdicts: Verdicts
    precision: Precision

    def order(self, task: Task) -> tuple[Dtype, ...]:
        """The precisions to try."""
        return self._order(task, self.verdicts.of(task.checkpoint))

    def order_of_batch(self, task: Task) -> tuple[Dtype, ...]:
        """The same for a batch that will run, which may be the one that tries a verdict again."""
        return self._order(task, self.verdicts.of_batch(task.checkpoint))

    def _order(self, task: Task, fp16: Fp16) -> tuple[Dtype, ...]:
        return dtypes(task.precision, self.precision, self.device, fp16)

    def demoted(self, task: Task, order: tuple[Dtype, ...]) -> bool:
        """Whether a known overflow in fp16 keeps the task, which is tried in this order, from its first precision."""
        return order[0] != dtypes(task.precision, self.precision, self.device, "ok")[0]

    def unusual(self, task: Task, plan: ExecutionPlan) -> bool:
        """Whether a request's own wish led to another plan than the first choice for everybody."""
        usual = dtypes("auto", self.precision, self.device, self.verdicts.of(task.checkpoint))[0]
        wished = task.precision != "auto" or task.tiling == "always"
        return wished and (plan.dtype, plan.execution) != (usual, "whole")

    def available(self, task: Task) -> int:
        """Bytes of working memory that a batch may take, idle models evicted.

        A deterministic task is planned for an otherwise empty device: its plan must not depend on the moment.
        """
        if task.deterministic:
            return self.memory.capacity() - self.cache.bytes_of(task.checkpoint, "fp32")
        return self.cache.free + self.cache.evictable

    def prospect(self, task: Task) -> int:
        """`available` to a task whose weights may not be there yet, or are among those that could be evicted."""
        available, dtype = self.available(task), self.order(task)[0]
        if task.deterministic or self.cache.kept(task.checkpoint, dtype):
            return available
        return available - self.cache.bytes_of(task.checkpoint, dtype)

    def choose(
        self,
        task: Task,
        shape: tuple[int, ...],
        items: int,
        dtype: Dtype,
        available: int,
        failed: ExecutionPlan | None = None,
        itemsize: int = 1,
        whole_clip: bool = False,
    ) -> Choice:
        """The first plan that fits, after the one that `failed`.

        `itemsize` is of the arrays; a clip's are a slice of it unless they are the `whole_clip`. Blocking: the plan of
        bands is searched for each new shape, which takes some 100 ms. Raises OutOfMemory, with the smallest plan's
        bytes, when nothing fits, InvalidParameter where the network has no bands and they were asked for.
        """
        pixels = picture_pixels(task, shape)
        network = self.shape_of(task, shape, itemsize, whole_clip)
        executions = task.checkpoint.architecture.executions
        plans = candidates(dtype, task.tiling, items, pixels, self.device, executions)
        plan = choose(
            plans if failed is None else after(plans, failed),
            lambda plan: self.forecaster.peak(network, plan),
            available,
        )
        if plan is not None and plan.execution == "recompute" and failed is None:
            # There is more room than the leanest way needs: it may be the fastest way that fits.
            return Choice(replace(plan, budget=self.forecaster.budget(network, plan, available)), available)
        if plan is not None:
            first = next(candidates(dtype, task.tiling, items, pixels, self.device, executions))
            return Choice(plan, self.forecaster.peak(network, plan), plan == first and plan.batch == items)
        smallest = list(candidates(dtype, task.tiling, 1, pixels, self.device, executions))[-1:]
        hint = "; tiling=never forbids smaller plans" if task.tiling == "never" else ""
        if not smallest and task.tiling == "always":
            raise InvalidParameter(f"tiling=always: an autoencoder of {task.checkpoint.name}'s kind runs whole only")
        if not smallest:
            raise OutOfMemory(f"{pixels} pixels are too many for one whole forward on {self.device}{hint}")
        needs = self.forecaster.peak(network, smallest[0])
        if failed is not None:
            raise OutOfMemory(
                f"{pixels} pixels ran out of memory in {failed}, the last plan there was; "
                f"the forecast was {needs} bytes, and {max(0, available)} seemed to be available{hint}"
            )
        raise OutOfMemory(
            f"{pixels} pixels need {needs} bytes in the smallest plan, {smallest[0]}; "
            f"{max(0, available)} bytes are available{hint}"
        )

    def shape_of(self, task: Task, shape: tuple[int, ...], itemsize: int = 1, whole_clip: bool = False) -> NetworkShape:
        """`shape_of`, of a network that has the kernels which this device gives it in float32."""
        has = self.cache.kernels.nbytes(task.checkpoint, "fp32") > 0
        return replace(shape_of(task, shape, itemsize, whole_clip), kernels=has)

    def prepare(self, checkpoint: Checkpoint, dtype: Dtype, op: Op, side: int) -> None:
        """Counts what forecasts of whole runs lie between, for one of `forecast.SIDES`. Blocking, some 30 ms."""
        channels, factor = checkpoint.family.latent_channels, checkpoint.family.spatial_factor
        shape = (side, side, 3) if op == "encode" else (channels, side // factor, side // factor)
        task = Task(op, checkpoint, latents="raw")
        self.forecaster.peak(self.shape_of(task, shape), ExecutionPlan(dtype, "whole", 1))

    def answer(self, name: str, task: Task, shape: tuple[int, ...], free: int, available: int) -> PlanAnswer:
        """What would be planned for one item. Blocking; `free` and `available` are read on the event loop before."""
        pixels = picture_pixels(task, shape)
        network = self.shape_of(task, shape)
        executions = task.checkpoint.architecture.executions
        plans = candidates(self.order(task)[0], task.tiling, 1, pixels, self.device, executions)
        peaks = {str(plan): self.forecaster.peak(network, plan) for plan in plans}
        chosen = next((plan for plan, peak in peaks.items() if peak <= available), None)
        return PlanAnswer(name, chosen, peaks[chosen] if chosen else None, free, available, peaks)


def shape_of(task: Task, shape: tuple[int, ...], itemsize: int = 1, whole_clip: bool = False) -> NetworkShape:
    """The network-side shape of one item's array, whose numbers have so many bytes."""
    if task.op == "encode":
        found = network_shape(task.checkpoint, task.op, shape[-3], shape[-2], itemsize)
    else:
        side, (_, dtype) = task.checkpoint.family.side(task.latents), OUTPUTS[task.output]
        found = network_shape(task.checkpoint, task.op, shape[-2] * side, shape[-1] * side, dtype.itemsize)
    return replace(found, frames=shape[0 if task.op == "encode" else 1]) if whole_clip else found
