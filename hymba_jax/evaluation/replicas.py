"""Copies of a model, one on each device, which share the batches of an evaluation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import batched

import jax

from hymba_jax.checkpoint.checksums import digest, tree_checksums
from hymba_jax.inference import LanguageModel
from hymba_jax.parallel.processes import gather, require_agreement


class Replicas:
    """A model on several devices of this process, and on as many of each other process.

    A batch is computed by one of them, with the program that a single device would run: results
    have the same bits on any number of devices of one kind.

    Args:
      model: of the same parameters in every process.
      devices: of this process; all of them if absent.

    Raises:
      HymbaError: the processes have different models or numbers of devices.
    """

    def __init__(self, model: LanguageModel, devices: Sequence[jax.Device] | None = None) -> None:
        devices = jax.local_devices() if devices is None else devices
        if jax.process_count() > 1:
            require_agreement(
                {
                    "number of devices": len(devices),
                    "batch_size": model.batch_size,
                    "parameters of the model": digest(tree_checksums(model.engine.params)),
                }
            )
        self._models = [model.on_device(device) for device in devices]
        self._pool = ThreadPoolExecutor(len(devices))

    def map[Batch, Result](
        self, function: Callable[[LanguageModel, Batch], Result], batches: Iterable[Batch]
    ) -> Iterator[Result]:
        """The function of each batch, in their order; every process gets all results.

        As many batches as there are replicas are computed at a time, so those that come one after
        the other should take equally long.

        Args:
          function: of a replica and a batch; of several processes the result is a JSON value.
          batches: the same in every process.
        """
        process, processes = jax.process_index(), jax.process_count()
        for several in batched(batches, len(self._models) * processes):
            own = [*self._pool.map(function, self._models, several[process::processes])]
            results = gather(own)
            yield from (results[i % processes][i // processes] for i in range(len(several)))
