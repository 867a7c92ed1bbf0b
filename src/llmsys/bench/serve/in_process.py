"""transformers in this process: its continuous batching, and static batches as the naive way that it is compared with.

The model computes in a thread of its own, and tells the client's event loop of each token. Both are one process, so the
client waits for Python where the model has it: what that adds to a token's time is part of the figures here, as it is
in a service that is written so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from llmsys.bench.serve.load import Request
from llmsys.bench.serve.outcome import Failed, Outcome

TOKENS = 512
"""Of prompts in one pass, at most; a longer prompt is read in one all the same."""
NEVER = -1
"""As the id of the end-of-text token: no text ends before its length."""


class Continuous:
    """transformers' manager over `model`, with at most `most` requests under way and pages of `page` tokens; its cache
    has room for so many of `longest` tokens. Use it as a context."""

    def __init__(self, model: Any, most: int, page: int, longest: int) -> None:
        self.model, self.most, self.page, self.longest = model, most, page, longest
        self._context: Any = None
        self._manager: Any = None
        self._names = itertools.count()
        self._open: set[asyncio.Queue[Any]] = set()
        self._watching: asyncio.Task[None] | None = None

    def __enter__(self) -> Continuous:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        pages = self.most * (-(-self.longest // self.page) + 1)
        how = ContinuousBatchingConfig(
            page_size=self.page,
            num_blocks=pages,
            max_batch_tokens=max(TOKENS, self.longest),
            max_requests_per_batch=self.most,
            allow_block_sharing=False,
            use_cuda_graph=None if self.model.device.type == "cuda" else False,
            auto_switch_to_flash=False,
        )
        told = GenerationConfig(do_sample=False, eos_token_id=NEVER, max_new_tokens=self.longest)
        self._context = self.model.continuous_batching_context_manager(
            told, continuous_batching_config=how, warmup=self.model.device.type == "cuda", timeout=10
        )
        self._manager = self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def ready(self, request: Request) -> None:
        """Nothing: ids are handed over as they are."""

    async def stream(self, ready: None, request: Request, outcome: Outcome) -> AsyncIterator[int]:
        """See `client.Server`."""
        came: asyncio.Queue[Any] = asyncio.Queue()
        name = f"{next(self._names)}"  # none is used twice: what is cancelled may be so after the next one has begun
        self._open.add(came)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        self._manager.register_result_handler(name, came.put_nowait)
        self._manager.add_request(
            list(request.prompt), request_id=name, max_new_tokens=request.new, streaming=True, eos_token_id=NEVER
        )
        seen = 0
        try:
            while seen < request.new:
                result = await came.get()
                if isinstance(result, Failed):
                    raise result
                if result.error:
                    raise Failed("error", str(result.error))
                count = len(result.generated_tokens) - seen
                seen += count
                if count:
                    yield count
                if result.is_finished() and seen < request.new:
                    raise Failed("closed", f"{seen} of {request.new} tokens came")
        finally:
            self._open.discard(came)
            if seen < request.new:
                self._manager.cancel_request(name)

    async def _watch(self) -> None:
        """Tells all that wait when the manager has ended."""
        while self._open:
            await asyncio.sleep(1.0)
            if not self._manager.is_running():
                for came in self._open:
                    came.put_nowait(Failed("error", "transformers' manager has ended"))
                return


@dataclass(kw_only=True, eq=False)
class _Waiting:
    """`gone`: nobody waits for it any more."""

    request: Request
    tell: Callable[[int | Exception], None]
    gone: bool = False


class Static:
    """One batch after the other, of at most `most` requests that wait then; each runs as long as its longest."""

    def __init__(self, model: Any, most: int) -> None:
        self.model, self.most = model, most
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._asked: set[_Waiting] = set()
        self._thread = threading.Thread(target=self._run, name="static batches")

    def __enter__(self) -> Static:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for each in self._asked:
            each.gone = True
        self._waiting.put(None)
        self._thread.join()

    def ready(self, request: Request) -> None:
        """Nothing: ids are handed over as they are."""

    async def stream(self, ready: None, request: Request, outcome: Outcome) -> AsyncIterator[int]:
        """See `client.Server`."""
        came: asyncio.Queue[int | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(what: int | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(came.put_nowait, what)

        own = _Waiting(request=request, tell=tell)
        self._asked.add(own)
        self._waiting.put(own)
        try:
            for _ in range(request.new):
                what = await came.get()
                if isinstance(what, Exception):
                    raise Failed("error", f"{type(what).__name__}: {what}")
                yield what
        finally:
            own.gone = True
            self._asked.discard(own)

    def _run(self) -> None:
        while (batch := [*self._batch()]) and batch[-1] is not None:
            some = [each for each in batch if each is not None and not each.gone]
            try:
                if some:
                    self._generate(some)
            except Exception as error:  # noqa: BLE001  whatever the framework raises is these requests' end
                for each in some:
                    each.tell(error)

    def _batch(self) -> Iterator[_Waiting | None]:
        """Waits for one, and takes those that are there."""
        yield self._waiting.get()
        for _ in range(self.most - 1):
            try:
                yield self._waiting.get_nowait()
            except queue.Empty:
                return

    def _generate(self, batch: Sequence[_Waiting]) -> None:
        longest = max(len(each.request.prompt) for each in batch)
        prompts = [each.request.prompt for each in batch]
        ids = torch.tensor([[0] * (longest - len(each)) + [*each] for each in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        told, left = _Told(batch), StoppingCriteriaList([_Left(batch)])
        new = max(each.request.new for each in batch)
        how: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "eos_token_id": NEVER, "pad_token_id": 0}
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=mask, streamer=told, stopping_criteria=left, **how)


class _Told:
    """What transformers calls a streamer: told the prompts, then a token of each row at a time."""

    def __init__(self, batch: Sequence[_Waiting]) -> None:
        self.batch, self.step = batch, -1

    def put(self, _: torch.Tensor) -> None:
        if self.step >= 0:
            for each in self.batch:
                if self.step < each.request.new:
                    each.tell(1)
        self.step += 1

    def end(self) -> None:
        """Nothing is left to say."""


class _Left(StoppingCriteria):
    """Ends a batch for which nobody waits."""

    def __init__(self, batch: Sequence[_Waiting]) -> None:
        self.batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return torch.full((len(self.batch),), all(each.gone for each in self.batch), device=input_ids.device)
