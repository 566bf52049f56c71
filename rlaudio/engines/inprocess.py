"""vLLM inside this process: one thread steps its `LLMEngine`, asyncio stands in front of it.

On a CPU this starts in a third of the time of `AsyncLLM` and has no child process. Everything that touches the engine
happens in its thread, between two steps: admitting, aborting, swapping weights. While nothing runs the thread sleeps.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlaudio.engines.base import Generation, GenerationRequest, SwapReport, WeightUpdate
from rlaudio.engines.llm_engine import build, sampled, shut_down
from rlaudio.engines.mailbox import (
    Abort,
    Admit,
    Call,
    Enter,
    GiveUp,
    Leave,
    Message,
    Reply,
    Swap,
    outcome,
    remove,
    send,
)
from rlaudio.engines.probe import ProcessedPrompt, TopLogprobs, process, to_top_logprobs
from rlaudio.engines.settings import EngineSettings
from rlaudio.engines.swapping import Piece, SwapPolicy, joined, rest_of
from rlaudio.engines.vllm_requests import to_finish_reason, to_piece, to_prompt, to_sampling_params
from rlaudio.errors import EngineDeadError, EngineError, WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights.snapshot import to_torch, verify_update

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

CLOSE_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """A request inside vLLM. `part` is what vLLM was given: the rest behind the pieces that swaps cut off."""

    admission: Admit
    part: GenerationRequest
    pieces: tuple[Piece, ...] = ()


class InProcessEngine:
    """The `Engine` protocol over a vLLM `LLMEngine` in a thread of this process.

    Building takes seconds (and vLLM's import 15 more). One process holds one such engine at a time: vLLM keeps its
    process groups in globals.

    Args:
        settings: the engine to build.
        version: the weights that lie in `settings.model`.
        swap: how weights are swapped; may be exchanged while nothing runs.
        start_deadline_s: how long building may take.

    Raises:
        EngineError: vLLM could not build the engine, or not in time.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        version: WeightVersion,
        swap: SwapPolicy = SwapPolicy(),  # noqa: B008 (frozen)
        start_deadline_s: float = 300.0,
    ) -> None:
        self.swap = swap
        self._settings = settings
        self._version = version
        self._inbox: deque[Message] = deque()
        self._taken: deque[Message] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._death: EngineError | None = None
        self._ready = threading.Event()
        self._running: dict[str, _Turn] = {}
        self._dialogues: list[Enter] = []
        self._swaps: deque[Swap] = deque()
        self._num_swaps = 0  # so far
        self._waiting: deque[Admit | Enter] = deque()
        self._answers: list[tuple[Reply, Any]] = []
        self._thread = threading.Thread(target=self._main, name="rlaudio-engine", daemon=True)
        self._thread.start()
        if not self._ready.wait(start_deadline_s):
            self._closing = True
            raise EngineError(f"the engine for {settings.model} was not built within {start_deadline_s:.0f} s")
        if self._death is not None:
            raise self._death

    @property
    def version(self) -> WeightVersion:
        return self._version

    @property
    def num_running(self) -> int:
        """Requests inside vLLM, those that it lets wait included."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Turns and dialogues that wait for a swap, and swaps that have not begun."""
        return len(self._waiting) + len(self._swaps)

    async def generate(self, request: GenerationRequest) -> Generation:
        """See `Engine.generate`."""
        generation: Generation = await self._ask(Admit(request, Reply.here(), time.monotonic()))
        return generation

    async def _ask(self, admission: Admit) -> Any:
        self._post(admission)
        try:
            return await admission.reply.future
        except asyncio.CancelledError:
            self._post_quietly(Abort(admission))
            raise

    async def update_weights(self, update: WeightUpdate, *, deadline_s: float) -> SwapReport:
        """See `Engine.update_weights`. Checksums are compared beside generation; only the swap stops it."""
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.to_thread(verify_update, update)
                return await self._swapped(update)
        except TimeoutError as error:
            raise self.swap.too_late(
                update.version,
                deadline_s=deadline_s,
                current=self._version,
                turns=tuple(self._running),
                dialogues=tuple(entry.name for entry in tuple(self._dialogues)),
            ) from error

    async def _swapped(self, update: WeightUpdate) -> SwapReport:
        swap = Swap(update=update, reply=Reply.here(), sent_s=time.monotonic())
        self._post(swap)
        try:
            report: SwapReport = await swap.reply.future
        except asyncio.CancelledError:
            self._post_quietly(GiveUp(swap))
            raise
        return report

    @asynccontextmanager
    async def dialogue(self, name: str) -> AsyncIterator[None]:
        """See `Engine.dialogue`."""
        if not self.swap.dialogue_waits:  # nobody counts
            yield
            return
        entry = Enter(name, Reply.here())
        self._post(entry)
        try:
            await entry.reply.future
            yield
        finally:
            self._post_quietly(Leave(entry))

    async def close(self) -> None:
        """See `Engine.close`. What still runs fails with EngineError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            raise EngineError(f"the engine thread did not end within {CLOSE_DEADLINE_S:.0f} s: end the process")

    # ---- for the doctor, see `engines.probe` -----------------------------------------------------------------------

    async def top_logprobs(self, request: GenerationRequest, *, num_top: int) -> list[TopLogprobs]:
        """See `ProbedEngine.top_logprobs`."""
        vocabulary = await self._call(lambda engine: engine.model_config.get_vocab_size())
        num_top = min(num_top, vocabulary)
        tops: list[TopLogprobs] = await self._ask(Admit(request, Reply.here(), time.monotonic(), num_top))
        return tops

    async def processed(self, request: GenerationRequest) -> ProcessedPrompt:
        """See `ProbedEngine.processed`."""
        prompt: ProcessedPrompt = await self._call(lambda engine: process(engine.model_config, request))
        return prompt

    async def call_workers(self, method: str, *arguments: Any, deadline_s: float = 120.0) -> list[Any]:
        """See `ProbedEngine.call_workers`."""
        try:
            async with asyncio.timeout(deadline_s):
                answers: list[Any] = await self._call(lambda engine: engine.collective_rpc(method, args=arguments))
        except TimeoutError as error:
            raise EngineError(f"the engine's workers did not answer {method} within {deadline_s:g} s") from error
        return answers

    async def _call(self, function: Callable[[LLMEngine], Any]) -> Any:
        """Run `function` in the engine's thread between two steps; what it raises comes back as EngineError."""
        call = Call(function, Reply.here())
        self._post(call)
        return await call.reply.future

    # ---- inbox, from any thread ----------------------------------------------------------------------------------

    def _post(self, message: Message) -> None:
        with self._wake:
            if self._death is not None:
                raise EngineDeadError(f"the engine is dead: {self._death}") from self._death
            if self._closing:
                raise EngineError("the engine is closed: build a new one")
            self._inbox.append(message)
            self._wake.notify()

    def _post_quietly(self, message: Message) -> None:
        """Post what nobody waits for: an engine that is gone has nothing left to do about it."""
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    def _take(self) -> bool:
        """Take over everything that arrived; waits only when the engine has nothing to do. False ends the thread."""
        with self._wake:
            while not (self._inbox or self._running or self._closing or self._swap_is_due):
                self._wake.wait()
            self._taken, self._inbox = self._inbox, deque()
            return not self._closing

    # ---- the engine thread ---------------------------------------------------------------------------------------

    def _main(self) -> None:
        engine: LLMEngine | None = None
        try:
            engine = build(self._settings, self._version)
            self._ready.set()
            while self._take():
                while self._taken:
                    self._handle(engine, self._taken.popleft())
                self._swap_when_due(engine)
                if self._running:
                    self._collect(engine.step())
                self._send_answers()
            self._die(EngineError("the engine was closed while requests were running"))
        except BaseException as error:  # whatever ends this thread must reach everyone who waits
            death = EngineDeadError(f"the engine thread ended with {type(error).__name__}: {error}")
            death.__cause__ = error
            self._die(death)
        finally:
            self._ready.set()
            if engine is not None:
                shut_down(engine)

    def _handle(self, engine: LLMEngine, message: Message) -> None:
        match message:
            case Admit() | Enter() if self._must_wait(message):
                self._waiting.append(message)
            case Admit():
                self._admit(engine, message)
            case Enter():
                self._dialogues.append(message)
                self._answers.append((message.reply, None))
            case Abort(admission):
                self._abort(engine, admission)
            case Leave(entry):
                remove(self._waiting, entry)
                remove(self._dialogues, entry)
            case Swap():
                self._swaps.append(message)
            case GiveUp(swap):
                remove(self._swaps, swap)
                self._let_in(engine)
            case Call():
                self._answers.append((message.reply, outcome(message.function, engine)))

    def _must_wait(self, message: Admit | Enter) -> bool:
        if not self._swaps:
            return False
        if isinstance(message, Enter):
            return self.swap.dialogue_waits
        return self.swap.turn_waits(num_dialogues=len(self._dialogues))

    def _let_in(self, engine: LLMEngine) -> None:
        waiting, self._waiting = self._waiting, deque()
        for message in waiting:
            self._handle(engine, message)

    def _admit(self, engine: LLMEngine, admission: Admit) -> None:
        name = admission.request.request_id
        if admission.reply.future.cancelled():
            return
        if name in self._running:
            self._answers.append((admission.reply, EngineError(f"request id {name!r} is in flight")))
            return
        self._begin(engine, _Turn(admission, admission.request))

    def _begin(self, engine: LLMEngine, turn: _Turn) -> None:
        name = turn.part.request_id
        try:
            prompt = to_prompt(turn.part, salt=self.swap.salt(num_swaps=self._num_swaps))
            params = to_sampling_params(turn.part.sampling, num_top=turn.admission.num_top)
            _add(engine, name, prompt, params)
        except Exception as error:  # vLLM refuses with many types; the request is lost, not the engine
            refusal = EngineError(f"request {name!r} was refused: {error}")
            refusal.__cause__ = error
            self._running.pop(name, None)
            self._answers.append((turn.admission.reply, refusal))
            return
        self._running[name] = turn

    def _abort(self, engine: LLMEngine, admission: Admit) -> None:
        remove(self._waiting, admission)
        name = admission.request.request_id
        if (turn := self._running.get(name)) is not None and turn.admission is admission:
            del self._running[name]
            engine.abort_request([name])

    def _collect(self, outputs: list[Any]) -> None:
        for output in outputs:
            if not output.finished:
                continue
            turn = self._running.pop(output.request_id, None)
            if turn is not None:
                self._answers.append((turn.admission.reply, self._answer(output, turn)))

    def _answer(self, output: RequestOutput, turn: _Turn) -> Generation | list[TopLogprobs] | EngineError:
        try:
            if turn.admission.num_top:
                return to_top_logprobs(output, turn.part)
            pieces = (*turn.pieces, to_piece(output, turn.part, keep_kv_cache=self.swap.keep_kv_cache))
            reason = to_finish_reason(output, turn.part)
            return joined(pieces, finish_reason=reason, generate_s=time.monotonic() - turn.admission.sent_s)
        except EngineError as error:
            return error

    # ---- swapping weights, in the engine thread ------------------------------------------------------------------

    @property
    def _swap_is_due(self) -> bool:
        return bool(self._swaps) and self.swap.may_swap(
            num_turns=len(self._running), num_dialogues=len(self._dialogues)
        )

    def _swap_when_due(self, engine: LLMEngine) -> None:
        while self._swap_is_due:
            swap = self._swaps.popleft()
            if swap.reply.future.cancelled():
                continue
            try:
                self._swap(engine, swap)
            except Exception as error:
                # The model is half loaded: whoever asked is told, and the thread ends and with it the engine.
                failure = f"the swap to weights {swap.update.version} failed halfway: {error}"
                self._answers.append((swap.reply, WeightSyncError(failure)))
                raise
        if not self._swaps:
            self._let_in(engine)

    def _swap(self, engine: LLMEngine, swap: Swap) -> None:
        """Between two steps: check, load, and forget everything computed under the old weights."""
        update, paused_s, num_running = swap.update, time.monotonic(), len(self._running)
        engine.collective_rpc("start_weight_update")
        shapes = {name: list(array.shape) for name, array in update.tensors.items()}
        try:
            engine.collective_rpc("update_weights", kwargs={"update_info": {"shapes": shapes}})
        except WeightSyncError as error:
            self._answers.append((swap.reply, error))
            return
        cut = self._cut(engine)
        tensors = {name: to_torch(array, update.dtypes[name]) for name, array in update.tensors.items()}
        engine.collective_rpc("update_weights", kwargs={"update_info": {"tensors": tensors}})
        engine.collective_rpc("finish_weight_update")
        engine.set_weight_version(str(update.version))
        if not self.swap.keep_kv_cache:
            # Requests in flight go back to the queue and their KV cache is computed again.
            engine.reset_prefix_cache(reset_running_requests=True)
        # Rows of the encoder include the adaptor, which is trained. Media features stay: no weight has touched them.
        engine.reset_encoder_cache()
        self._version = update.version
        self._num_swaps += 1
        for name in cut:
            self._begin(engine, self._running[name])
        now_s = time.monotonic()
        self._answers.append((swap.reply, SwapReport(now_s - paused_s, paused_s - swap.sent_s, num_running)))

    def _cut(self, engine: LLMEngine) -> list[str]:
        """Take requests out of vLLM that begin again after the swap, behind what they have sampled: their names."""
        cut = []
        for name, turn in list(self._running.items()):
            output = sampled(engine, turn.part)
            if not self.swap.cuts(num_sampled=len(output.outputs[0].token_ids)):
                continue
            engine.abort_request([name])
            try:
                self._running[name] = _cut_off(turn, output)
            except EngineError as error:
                del self._running[name]
                self._answers.append((turn.admission.reply, error))
            else:
                cut.append(name)
        return cut

    def _die(self, death: EngineError) -> None:
        with self._wake:
            self._death = death
            messages = [*self._taken, *self._inbox]
            self._inbox.clear()
        messages += [*self._waiting, *self._swaps]
        waiting = [message.reply for message in messages if not isinstance(message, Abort | Leave | GiveUp)]
        waiting += [turn.admission.reply for turn in self._running.values()]
        self._running.clear()
        self._waiting.clear()
        self._swaps.clear()
        self._answers += [(reply, death) for reply in waiting]
        self._send_answers()

    def _send_answers(self) -> None:
        answers, self._answers = self._answers, []
        send(answers)


def _add(engine: LLMEngine, name: str, prompt: dict[str, Any], params: SamplingParams) -> None:
    """As vLLM adds a request, with every clip that it takes for sent although it refused whoever brought it."""
    from vllm.multimodal.cache import MultiModalCacheMissError

    try:
        engine.add_request(name, prompt, params)
    except MultiModalCacheMissError as miss:
        engine.abort_request([name])  # half of it was added
        if (sent := engine.renderer.mm_processor_cache) is not None:
            for clip in miss.mm_hashes:
                sent.invalidate(clip)
        engine.add_request(name, prompt, params)


def _cut_off(turn: _Turn, output: RequestOutput) -> _Turn:
    """What is left of a turn behind `output`. A probe begins anew: it wants the distributions of one version."""
    if turn.admission.num_top:
        return turn
    pieces = (*turn.pieces, to_piece(output, turn.part, keep_kv_cache=False))
    return _Turn(turn.admission, rest_of(turn.admission.request, pieces), pieces)
