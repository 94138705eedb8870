"""The vllm engine: fills the missing samples of a corpus from a pool of servers.

Only what is missing on disk is asked for, so a restart, with any number of servers, goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import aiohttp
import numpy as np
import uvloop
from numpy.typing import NDArray
from yarl import URL

from datagen.client import HEALTH_TIMEOUT_S, Pool
from datagen.collector import Collector
from datagen.config import GenerateJob, Mode, ServerAccess
from datagen.examination import TEXT, Expected, Findings, examine, refusal_of
from datagen.fingerprint import Probe, from_json, prompts_of, reference_fingerprint, to_json
from datagen.pieces import Pieces
from datagen.protocol import BadReply, Phantom, Reply, Sampling, parse_reply
from datagen.sampling import SamplingPlan
from datagen.server import Busy, Server, Unfit, Work
from datagen.throughput import Throughput
from recovery.artifacts import read_manifest
from recovery.corpus import Sample, Split
from recovery.errors import UserError
from recovery.files import read_json, write_json
from recovery.progress import progress
from recovery.teacher_signal import TopLogprobs
from recovery.tracking import Tracker

log = logging.getLogger("recover-lora")
MOST_REDRAWS = 16
SCRAPE_SECONDS = 10.0
PROBE_TIMEOUT_S = 300.0  # a server compiles at its first requests
AGREEMENT = ".agreement.json"


@dataclass(frozen=True)
class Vocabulary:
    """What sampling needs to know of the tokenizer. bos: the id in front of every sample; width: logits in use."""

    tokenizer: Any
    bos: int | None
    stops: frozenset[int]
    width: int
    eligible: Any


def agreeing(known: Sequence[Path], folder: Path, access: ServerAccess | None) -> list[Path]:
    """Those of some finished corpora whose servers were asked in the same mode and held the same model as this
    corpus' servers do, in `folder`; the first decides where nothing has been asked yet."""
    path = folder / AGREEMENT
    own = read_json(path) if path.exists() else None
    kept: list[Path] = []
    for corpus in known:
        details = read_manifest(corpus)["details"]
        theirs = {name: details.get(name) for name in ("mode", "fingerprint", "fingerprint_of")}
        if access is None or theirs["mode"] is None or theirs["fingerprint_of"] != access.fingerprint:
            continue
        if own is None:
            own = theirs
            write_json(path, own)
        if theirs == own:
            kept.append(corpus)
    return kept


class ServedEngine:
    """One job's conversation with its servers. missing: the indices of each split that are to be made."""

    def __init__(self, job: GenerateJob, folder: Path, vocabulary: Vocabulary) -> None:
        access = job.runtime.servers
        if access is None or not access.urls:
            raise UserError(
                "generate.engine", "vllm, but no servers are known", "add a `servers` section to the cluster file"
            )
        self._job, self._folder, self._access, self._vocabulary = job, folder, access, vocabulary
        self._findings: dict[str, Findings] = {}
        self.sampling: Sampling | None = None
        self._agreement = folder / AGREEMENT
        self._mode: Mode | None = None if job.generate.mode == "auto" else job.generate.mode
        self._agreed: list[Probe] | None = None
        self._fingerprint_of = access.fingerprint
        if self._agreement.exists():
            agreed = read_json(self._agreement)
            self._mode, self._agreed = agreed["mode"], from_json(agreed["fingerprint"])
            self._fingerprint_of = agreed["fingerprint_of"]
        self._first = asyncio.Lock()
        key = access.key()
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._addresses = {url: URL(f"{url}/v1/completions") for url in access.urls}
        self._plans: dict[Split, SamplingPlan] = {
            split: SamplingPlan(job.seed, split, vocabulary.eligible) for split in get_args(Split)
        }

    @property
    def details(self) -> dict[str, Any]:
        """For the manifest."""
        first = next(iter(self._findings.values()), None)
        return {
            "mode": self._mode,
            "fingerprint_of": self._fingerprint_of,
            "fingerprint": to_json(self._agreed or []),
            "server_versions": sorted({f.version for f in self._findings.values()}),
            "model_name": first.model if first else None,
        }

    def fill(
        self, missing: dict[Split, NDArray[np.int64]], pieces: dict[Split, Pieces], tracker: Tracker, done: int
    ) -> dict[str, object]:
        """Make the missing samples; they are in `pieces` when this returns. done: samples that are there already."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._fill(missing, pieces, tracker, done))

    async def _fill(
        self, missing: dict[Split, NDArray[np.int64]], pieces: dict[Split, Pieces], tracker: Tracker, done: int
    ) -> dict[str, object]:
        _raise_file_limit(len(self._access.urls) * self._access.requests_per_server + 256)
        self._expected = self._expectation()
        count = sum(len(indices) for indices in missing.values())
        collector = Collector(pieces)
        bar = progress(done + count, "sample", "generate", done)

        def on_sample(work: Work, sample: Sample) -> None:
            collector.add(work.split, sample)
            bar.update()

        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=20),
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        )
        # Thousands of requests in flight are as many live objects, which the default thresholds walk again and again.
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)
        async with session:
            self._session = session
            pool = Pool(self._access, self._complete, self._examine, self._is_healthy, on_sample, collector.is_full)
            collector.on_written = pool.pump
            throughput = Throughput(pool)
            jobs = [
                asyncio.ensure_future(pool.run(self._works(missing))),
                asyncio.ensure_future(collector.watch()),
                asyncio.ensure_future(self._report(throughput, tracker, bar)),
            ]
            try:
                finished, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
                for job in finished:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()
                await asyncio.gather(*jobs, return_exceptions=True)
                await collector.close()
                bar.close()
                tracker.metrics(throughput.look(), bar.n)
        return throughput.record()

    def _expectation(self) -> Expected:
        job, vocabulary = self._job, self._vocabulary
        prompts = prompts_of(vocabulary.eligible, vocabulary.bos)
        fingerprint = self._agreed
        if self._access.fingerprint == "reference":
            memory = self._folder.parent / ".fingerprints"
            fingerprint = reference_fingerprint(job.model, job.dtype, prompts, vocabulary.width, memory)
        tokens = list(vocabulary.tokenizer(TEXT, add_special_tokens=False).input_ids)
        return Expected(job.model, job.dtype, job.generate, tokens, prompts, fingerprint)

    def _works(self, missing: dict[Split, NDArray[np.int64]]) -> Iterator[Work]:
        longest = self._job.generate.max_length
        for split, indices in missing.items():
            plan = self._plans[split]
            for index in indices.tolist():
                start = plan.start(index)
                yield Work(split, index, start.seed, start.token, longest)

    # ---- one server ----

    async def _examine(self, server: Server) -> None:
        async def wire(path: str, body: bytes | None = None) -> tuple[int, bytes]:
            status, answer = await self._send(server.url + path, body, PROBE_TIMEOUT_S)
            if status in (429, 502, 503, 504):
                raise Busy(status, None)
            return status, self._without_key(answer)

        # One after the other while the first to answer still has to set what the others must agree with.
        async with self._first if self._expected.fingerprint is None else nullcontext():
            findings = await examine(wire, self._expected)
            self._agree(findings)
        server.model = findings.model
        self._findings[server.url] = findings

    def _agree(self, findings: Findings) -> None:
        """One mode and one model for the whole corpus, after a restart too: as given, else as the first server has it.

        The two modes draw different samples of the same distribution, so a corpus is of one.
        """
        mode = self._mode or findings.mode
        if mode == "one_request" and findings.mode != "one_request":
            raise Unfit(
                "it has not loaded our logits processor, which this corpus was begun with; start it with "
                "--logits-processors datagen.vllm_processor:HybridSampling, or set generate.mode=two_requests"
            )
        self._mode = mode
        if self._expected.fingerprint is None:
            self._expected = replace(self._expected, fingerprint=findings.fingerprint)
        if not self._agreement.exists():
            agreed = self._expected.fingerprint or findings.fingerprint
            self._agreed = agreed
            content = {"mode": mode, "fingerprint": to_json(agreed), "fingerprint_of": self._fingerprint_of}
            write_json(self._agreement, content)

    async def _is_healthy(self, server: Server) -> bool:
        try:
            status, _ = await self._send(server.url + "/health", None, HEALTH_TIMEOUT_S)
        except (aiohttp.ClientError, OSError):
            return False
        return status < 500

    async def _send(self, url: str, body: bytes | None, timeout: float) -> tuple[int, bytes]:
        async with asyncio.timeout(timeout):
            if body is None:
                async with self._session.get(url, allow_redirects=False) as response:
                    return response.status, await response.read()
            headers = {"Content-Type": "application/json"}
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                return response.status, await response.read()

    # ---- one sample ----

    async def _complete(self, server: Server, work: Work) -> Sample:
        bos, settings = self._vocabulary.bos, self._job.generate
        prompt = [work.start_token] if bos is None else [bos, work.start_token]
        seed = work.seed
        replies = await self._replies(server, prompt, seed)
        for _ in range(MOST_REDRAWS):
            if replies is not None:
                break
            # Drawn anew, from a seed that follows from the first: the sample stays a function of its index.
            seed = SamplingPlan.next_seed(seed)
            replies = await self._replies(server, prompt, seed)
        if replies is None:
            raise BadReply(f"ids beyond the vocabulary in {MOST_REDRAWS + 1} draws")
        tokens = np.concatenate([np.array(prompt, dtype=np.int32), *(reply.tokens for reply in replies)])
        reason = replies[-1].finish_reason if replies else "length"
        signal = None
        if settings.capture_logprobs and replies:
            parts = [reply.signal for reply in replies if reply.signal is not None]
            fields = ("ids", "logprobs", "emitted", "drawn")
            signal = TopLogprobs(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
        return Sample(work.index, seed, work.start_token, reason, tokens, signal)

    async def _replies(self, server: Server, prompt: list[int], seed: int) -> list[Reply] | None:
        """The new tokens, in one request or in two; None when two drew an id beyond the vocabulary.

        Our processor keeps such ids from being drawn, so in one request they are a bad reply.
        """
        settings = self._job.generate
        room = settings.max_length - len(prompt)
        if room <= 0:
            return []
        sampling = self.sampling
        if sampling is None or sampling.model != server.model:
            assert self._mode is not None
            sampling = self.sampling = Sampling(
                server.model, settings, self._mode, self._vocabulary.stops, self._vocabulary.width
            )
        if self._mode == "one_request":
            body = await self._post(server, sampling.hybrid(prompt, seed))
            return [parse_reply(body, prompt, room, sampling, settings.greedy_tokens)]
        replies = []
        if first := min(settings.greedy_tokens, room):
            body = await self._post(server, sampling.greedy(prompt, first))
            replies.append(parse_reply(body, prompt, first, sampling, first))
            prompt = [*prompt, *replies[0].tokens.tolist()]
            if replies[0].finish_reason == "stop" or first == room:
                return replies
        body = await self._post(server, sampling.drawn(prompt, seed))
        try:
            return [*replies, parse_reply(body, prompt, room - first, sampling, 0)]
        except Phantom:
            return None

    async def _post(self, server: Server, body: bytes) -> bytes:
        url = self._addresses[server.url]
        payload = aiohttp.BytesPayload(body, content_type="application/json")
        async with self._session.post(url, data=payload, allow_redirects=False) as response:
            answer = await response.read()
            if response.status == 200:
                return answer
            if response.status in (429, 503):
                raise Busy(response.status, _seconds(response.headers.get("Retry-After")))
            if response.status >= 500 or response.status == 404:
                raise aiohttp.ClientPayloadError(f"HTTP {response.status}")
            raise refusal_of(response.status, self._without_key(answer))

    def _without_key(self, answer: bytes) -> bytes:
        """An answer fit for a message: some gateways repeat the key."""
        key = self._headers.get("Authorization", "").removeprefix("Bearer ").encode()
        return answer.replace(key, b"...") if key else answer

    # ---- reporting ----

    async def _report(self, throughput: Throughput, tracker: Tracker, bar: Any) -> None:
        """The progress line every second; the servers' metrics, and MLflow, every SCRAPE_SECONDS."""
        pool = throughput.pool
        scraped = time.monotonic()
        tokens_then, then = 0, time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            tokens = pool.tokens
            rate = (tokens - tokens_then) / (now - then)
            bar.set_postfix_str(
                f"{rate:.0f} tok/s, {pool.outstanding} in flight, {pool.usable}/{len(pool.servers)} servers",
                refresh=False,
            )
            if now - scraped >= SCRAPE_SECONDS:
                await asyncio.gather(*(self._scrape(server, throughput) for server in pool.servers if server.usable))
                tracker.metrics(throughput.look(), bar.n)
                scraped, tokens_then, then = now, tokens, now

    async def _scrape(self, server: Server, throughput: Throughput) -> None:
        try:
            status, page = await self._send(server.url + "/metrics", None, 10.0)
        except (aiohttp.ClientError, OSError):
            return
        if status == 200:
            throughput.saw(server.url, page)


def _seconds(text: str | None) -> float | None:
    try:
        return min(float(text), 60.0) if text is not None else None
    except ValueError:
        return None


def _raise_file_limit(wanted: int) -> None:
    """One connection a request in flight needs one file descriptor each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(wanted, soft), hard), hard))
