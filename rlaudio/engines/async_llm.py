"""vLLM's `AsyncLLM`: the engine core in a process of its own, for GPUs and tensor parallelism.

The core must find rlaudio's models and weight backend, so rlaudio has to be installed (vLLM's child processes find
plugins through installed metadata only). Weights reach the core as a safetensors file in anonymous memory: vLLM's
messages take no tensors, and a memory file needs no room in `/dev/shm` and vanishes with this process.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rlaudio.aio import undisturbed
from rlaudio.engines.base import Generation, GenerationRequest, SwapReport, WeightUpdate
from rlaudio.engines.gate import SwapGate
from rlaudio.engines.probe import ProcessedPrompt, TopLogprobs, process, to_top_logprobs
from rlaudio.engines.settings import EngineSettings, apply_environment, engine_arguments
from rlaudio.engines.swapping import Piece, SwapPolicy, joined, rest_of
from rlaudio.engines.vllm_requests import to_finish_reason, to_piece, to_prompt, to_sampling_params, was_aborted
from rlaudio.errors import EngineDeadError, EngineError, WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights.snapshot import verify_update

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState

CLOSE_DEADLINE_S = 15.0
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


class AsyncLLMEngine:
    """The `Engine` protocol over vLLM's `AsyncLLM`. Use it from one event loop.

    Args:
        settings: the engine to build.
        version: the weights that lie in `settings.model`.
        swap: how weights are swapped; may be exchanged while nothing runs.
        start_deadline_s: how long the engine core may take to answer.

    Raises:
        EngineError: vLLM could not build the engine, or not in time.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        version: WeightVersion,
        swap: SwapPolicy = SwapPolicy(),  # noqa: B008 (frozen)
        start_deadline_s: float = 600.0,
    ) -> None:
        self._version = version
        self._versioned = False
        self._death: EngineError | None = None
        # Held while a request is admitted and while weights are swapped: a request prepared before the media cache is
        # cleared and sent after it would name features that the core no longer has.
        self._admission = asyncio.Lock()
        self._gate = SwapGate(swap)
        self._num_swaps = 0
        self._llm = _build(settings, start_deadline_s)

    @property
    def version(self) -> WeightVersion:
        return self._version

    @property
    def num_running(self) -> int:
        """Requests inside vLLM, those that it lets wait included."""
        return self._llm.output_processor.get_num_unfinished_requests()

    @property
    def num_waiting(self) -> int:
        """Turns and dialogues that wait for a swap, and swaps that are not done."""
        return self._gate.num_waiting

    @property
    def swap(self) -> SwapPolicy:
        """How weights are swapped; may be exchanged while nothing runs."""
        return self._gate.policy

    @swap.setter
    def swap(self, policy: SwapPolicy) -> None:
        self._gate.policy = policy

    async def generate(self, request: GenerationRequest) -> Generation:
        """See `Engine.generate`."""
        sent_s = time.monotonic()
        pieces: list[Piece] = []
        async with self._gate.turn(request.request_id):
            while True:
                part = rest_of(request, pieces)
                output, was_cut = await self._output(part)
                pieces.append(to_piece(output, part, keep_kv_cache=self.swap.keep_kv_cache))
                if not was_cut:
                    reason = to_finish_reason(output, part)
                    return joined(pieces, finish_reason=reason, generate_s=time.monotonic() - sent_s)

    async def update_weights(self, update: WeightUpdate, *, deadline_s: float) -> SwapReport:
        """See `Engine.update_weights`. A swap that fails or hangs halfway ends the engine."""
        self._check_alive()
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.to_thread(verify_update, update)
                with _memory_file(f"rlaudio-weights-{update.version}") as path:
                    await asyncio.to_thread(_write, update, path)
                    sent_s = time.monotonic()
                    async with self._gate.swap():
                        await self._announce(update)
                        return await self._swap(path, update.version, sent_s=sent_s)
        except TimeoutError as error:
            raise self.swap.too_late(
                update.version,
                deadline_s=deadline_s,
                current=self._version,
                turns=self._gate.turns,
                dialogues=self._gate.dialogues,
            ) from error

    def dialogue(self, name: str) -> AbstractAsyncContextManager[None]:
        """See `Engine.dialogue`."""
        return self._gate.dialogue(name)

    async def close(self) -> None:
        """See `Engine.close`."""
        self._die(EngineError("the engine was closed while requests were running"))
        try:
            async with asyncio.timeout(2 * CLOSE_DEADLINE_S):
                await asyncio.to_thread(self._llm.shutdown, CLOSE_DEADLINE_S)
                # vLLM 0.32 leaves its message context open. `engine_core.ctx` only borrows it: ended there, its owner
                # would end it again when it is collected, and fail.
                await asyncio.to_thread(self._llm.engine_core.resources.ctx.destroy, 0)
        except TimeoutError as error:
            raise EngineError(f"the engine core did not end within {2 * CLOSE_DEADLINE_S:.0f} s: end it") from error

    # ---- for the doctor, see `engines.probe` -----------------------------------------------------------------------

    async def top_logprobs(self, request: GenerationRequest, *, num_top: int) -> list[TopLogprobs]:
        """See `ProbedEngine.top_logprobs`."""
        num_top = min(num_top, self._llm.model_config.get_vocab_size())
        async with self._gate.turn(request.request_id):
            was_cut = True
            while was_cut:  # a probe begins anew: it wants the distributions of one version
                output, was_cut = await self._output(request, num_top=num_top)
        return to_top_logprobs(output, request)

    async def processed(self, request: GenerationRequest) -> ProcessedPrompt:
        """See `ProbedEngine.processed`."""
        return await asyncio.to_thread(process, self._llm.model_config, request)

    async def call_workers(self, method: str, *arguments: Any, deadline_s: float = 120.0) -> list[Any]:
        """See `ProbedEngine.call_workers`."""
        self._check_alive()
        try:
            async with asyncio.timeout(deadline_s):
                answers: list[Any] = await self._llm.collective_rpc(method, args=arguments)
        except TimeoutError as error:
            raise EngineError(f"the engine's workers did not answer {method} within {deadline_s:g} s") from error
        except Exception as error:
            raise self._failed(f"probe {method}", error) from error
        return answers

    # ---- inside --------------------------------------------------------------------------------------------------

    async def _output(self, request: GenerationRequest, *, num_top: int = 0) -> tuple[RequestOutput, bool]:
        """What the core answered, and whether a swap cut it off."""
        output, was_cut = await self._answer(request, num_top=num_top)
        if output.outputs[0].finish_reason == "error":
            # A clip of a request that vLLM refused counts as sent, although the core never saw it. This answer made
            # vLLM forget so: sent again, the clip comes along.
            output, was_cut = await self._answer(request, num_top=num_top)
        return output, was_cut

    async def _answer(self, request: GenerationRequest, *, num_top: int) -> tuple[RequestOutput, bool]:
        collector, num_swaps = await self._admit(request, num_top=num_top)
        try:
            output = await _finished(collector)
            return output, was_aborted(output) and self._num_swaps > num_swaps
        except asyncio.CancelledError:
            await self._llm.abort(collector.request_id, internal=True)
            raise
        except Exception as error:
            raise self._failed(f"request {request.request_id!r}", error) from error
        finally:
            collector.close()

    async def _admit(self, request: GenerationRequest, *, num_top: int) -> tuple[RequestOutputCollector, int]:
        async with self._admission:
            self._check_alive()
            try:
                params = to_sampling_params(request.sampling, num_top=num_top)
                prompt = to_prompt(request, salt=self.swap.salt(num_swaps=self._num_swaps))
                if not self._versioned:
                    await self._llm.update_weight_version(str(self._version))
                    self._versioned = True
                # Given up halfway, vLLM would take the clips for sent: the next request that names them would fail.
                collector = await undisturbed(self._llm.add_request(request.request_id, prompt, params))
                return collector, self._num_swaps
            except Exception as error:
                raise self._failed(f"request {request.request_id!r}", error) from error

    async def _announce(self, update: WeightUpdate) -> None:
        """Names and shapes are checked between two steps while generation goes on; a refusal changes nothing."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        shapes = {name: list(array.shape) for name, array in update.tensors.items()}
        try:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"shapes": shapes}))
        except asyncio.CancelledError:
            # The core may or may not have opened a session; it takes no second one.
            self._die(EngineError(f"the update to weights {update.version} was given up before its answer"))
            raise
        except Exception as error:
            failure = self._failed(f"weights {update.version}", error)
            raise WeightSyncError(str(failure)) from error

    async def _swap(self, path: str, version: WeightVersion, *, sent_s: float) -> SwapReport:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async with self._admission:
            self._check_alive()
            paused_s, num_running = time.monotonic(), self.num_running
            try:
                await self._pause()
                await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"path": path}))
                await self._llm.finish_weight_update(str(version))
                await self._llm.resume_generation()
            except BaseException as error:
                death = EngineDeadError(
                    f"the swap to weights {version} failed halfway: {type(error).__name__}: {error}"
                )
                self._die(death)
                if isinstance(error, Exception):
                    raise WeightSyncError(str(death)) from error
                raise
            self._version = version
            self._versioned = True
            return SwapReport(time.monotonic() - paused_s, paused_s - sent_s, num_running)

    async def _pause(self) -> None:
        """Stop between two tokens, take out what begins again after the swap, forget what the old weights computed."""
        self._num_swaps += 1
        if self.swap.mode == "abort":
            # The core gives back what its requests had sampled; each goes on with `_admit`, which the swap holds up.
            await self._llm.pause_generation(mode="abort", clear_cache=True)
        elif not self.swap.keep_kv_cache:
            # Requests in flight are kept; with their caches cleared they are recomputed under the new weights.
            await self._llm.pause_generation(mode="keep", clear_cache=True)
        else:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            # A token that is still on its way is lost with its request, and sampled again by the new weights.
            states = self._llm.output_processor.request_states
            cut = [name for name, state in states.items() if self.swap.cuts(num_sampled=_num_sampled(state))]
            await self._llm.abort(cut, internal=True)
            # Rows of the encoder include the adaptor, which is trained.
            await self._llm.reset_encoder_cache()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(f"the engine is dead: {self._death}") from self._death

    def _failed(self, what: str, error: Exception) -> EngineError:
        """What the caller is told; remembers the engine's death when that is the reason."""
        if isinstance(error, EngineError):
            return error
        if self._llm.errored:
            death = EngineDeadError(f"the engine core died: {error}")
            self._die(death)
            return death
        return EngineError(f"{what} failed in the engine: {type(error).__name__}: {error}")

    def _die(self, death: EngineError) -> None:
        """Every later call fails with `death`, and so does everything that waits now."""
        if self._death is None:
            self._death = death
            self._gate.break_down(EngineDeadError(f"the engine is dead: {death}"))
            self._llm.output_processor.propagate_error(death)


def _num_sampled(state: RequestState) -> int:
    return state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0


async def _finished(collector: RequestOutputCollector) -> RequestOutput:
    from vllm.outputs import RequestOutput

    while True:
        output = collector.get_nowait() or await collector.get()
        if not isinstance(output, RequestOutput):
            raise EngineError(f"the engine answered a generation with {type(output).__name__}")
        if output.finished:
            return output


def _build(settings: EngineSettings, start_deadline_s: float) -> AsyncLLM:
    apply_environment(settings)
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(start_deadline_s))
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from rlaudio.models import plugin

    plugin.register()
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(settings)))
    except Exception as error:
        raise EngineError(f"the engine for {settings.model} could not be built: {error}") from error


@contextmanager
def _memory_file(name: str) -> Iterator[str]:
    """A path in anonymous memory that this process's children can open; gone when the block or the process ends."""
    descriptor = os.memfd_create(name)
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _write(update: WeightUpdate, path: str) -> None:
    """The arrays as safetensors, straight from memory: the library writes beside the path and renames."""
    header, offset = {}, 0
    for name, array in update.tensors.items():
        dtype = SAFETENSORS_DTYPES[update.dtypes[name]]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for array in update.tensors.values():
            file.write(array.reshape(-1).view(np.uint8).data)
