"""One live model whose parameters follow whatever checkpoint is to be evaluated; nothing is written to disk."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.sidecar import copy_sidecars, write_json
from surgery.engine.plan import Plan
from surgery.errors import Refused
from surgery.lab.recompute import Array, Recomputer
from surgery.lab.room import Room, default_room
from surgery.lab.subject import Subject
from surgery.lab.token import Tokens
from surgery.live import load_state

Builder = Callable[[Mapping[str, Any]], Any]


@dataclass
class Recomputed:
    """What the last `show` computed. fresh: the module was built anew."""

    tensors: int
    nbytes: int
    fresh: bool


class _Built:
    """A module and where each tensor of a checkpoint lies in it."""

    def __init__(self, module: Any, places: Mapping[str, Any]) -> None:
        self.module, self.places = module, places
        self.tokens: dict[str, str] = {}


class Resident:
    """Shows checkpoints as live modules.

    The module is built once, by transformers from the plan's config (or by `build(config)`), and kept for as long as plans
    have the same config and the same tensors. From one plan to the next only tensors whose own computation differs are
    computed, straight into the parameters.

    memory: bytes for what is kept besides the module (stored tensors, values that trials share); default a quarter of the
    machine's. dtype: "float32" and so on to run the module in; default that of the tensors, as transformers does. The weights
    are rounded as they would be written either way.
    """

    def __init__(
        self,
        *,
        memory: int | None = None,
        threads: int | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        build: Builder | None = None,
        forward: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.room = Room(default_room() if memory is None else memory)
        self._recomputer, self._threads = Recomputer(self.room, threads), threads
        self._dtype, self.device, self._builder, self.forward = dtype, _device(device), build, forward
        self._signature: Any = None
        self._built: _Built | None = None
        self._plan: Plan | None = None  # keeps alive what tokens of user functions speak of
        self._tokenizers: dict[Path, Any] = {}
        self._written: dict[str, Any] = {}  # directories of tokenizers that plans make
        self._others: dict[str, Resident] = {}
        self.last = Recomputed(0, 0, True)

    def like(self, *, dtype: str) -> Resident:
        """One that builds the same modules on the same device in `dtype`, and keeps nothing beside the module."""
        return Resident(memory=0, threads=self._threads, dtype=dtype, device=self.device, build=self._builder,
                        forward=self.forward)  # fmt: skip

    @property
    def places(self) -> Mapping[str, Any]:
        """Name in the checkpoint -> the parameter or buffer of the shown module that holds it, where one does."""
        return {} if self._built is None else self._built.places

    def beside(self, key: str) -> Resident:
        """A second live model, kept under `key`, with the same settings and nothing kept besides its module."""
        if key not in self._others:
            self._others[key] = Resident(
                memory=0, threads=self._threads, dtype=self._dtype, device=self.device, build=self._builder,
                forward=self.forward,
            )  # fmt: skip
            self._others[key]._tokenizers = self._tokenizers
        return self._others[key]

    def show(self, plan: Plan, name: str) -> Subject:
        """The module with the tensors of `plan`. It is the same module every time: what was shown before is gone.

        Raises Refused for deltas, unknown architectures, and tensors that do not fit.
        """
        if plan.node.space != "weights":
            raise Refused(f"{name} is a {plan.node.space}, no model", hint="add a delta to its base first")
        tokens = Tokens()
        wanted = {p.name: tokens.program(p) for p in plan.programs}
        shapes = {p.name: (p.shape, p.dtype.name) for p in plan.programs}
        signature = json.dumps(plan.config, sort_keys=True), shapes
        built = self._built
        changed: set[str] = set(wanted)
        if built is not None and signature == self._signature:
            changed = {n for n, t in wanted.items() if built.tokens.get(n) != t}
            if changed <= built.places.keys():
                for n in changed:
                    built.tokens.pop(n, None)  # until they are whole
                self._refill(plan, changed, built)
                built.tokens.update(wanted)
                return self._subject(plan, built, name, changed, fresh=False)
        self._built, self._signature = None, None  # frees the old module before the new one is made
        built = self._build(plan, name)
        built.tokens = wanted
        self._built, self._signature = built, signature
        return self._subject(plan, built, name, set(wanted), fresh=True)

    def _subject(self, plan: Plan, built: _Built, name: str, changed: set[str], *, fresh: bool) -> Subject:
        self._plan = plan
        self.last = Recomputed(len(changed), sum(p.nbytes for p in plan.programs if p.name in changed), fresh)
        return Subject(
            built.module,
            name,
            config=plan.config or {},
            files=self._files(plan),
            forward=self.forward,
            device=self.device,
            loaded=self._tokenizers,
        )

    # -- parameters ------------------------------------------------------------------------------------------------------

    def _refill(self, plan: Plan, names: set[str], built: _Built) -> None:
        """Compute tensors into the module's parameters."""
        import torch

        sizes = {p.name: p for p in plan.programs}
        staged: dict[str, Any] = {}
        targets: dict[str, Array] = {}
        lock = threading.Lock()

        def target(name: str) -> Array:
            with lock:
                if name not in targets:
                    place, program = built.places[name].data, sizes[name]
                    kind = getattr(torch, program.dtype.torch)
                    if not (place.dtype == kind and place.device.type == "cpu" and place.is_contiguous()):
                        place = staged[name] = torch.empty(program.shape, dtype=kind)
                    targets[name] = place.detach().reshape(-1).view(torch.uint8).numpy()
                return targets[name]

        def put(name: str, offset: int, raw: Array) -> None:
            target(name)[offset : offset + raw.size] = raw

        def finished(name: str) -> None:
            with lock:
                targets.pop(name, None)
                made = staged.pop(name, None)
            if made is not None:
                with torch.no_grad():
                    built.places[name].data.copy_(made)

        self._recomputer.fill(plan, names, put, finished, target)

    def _build(self, plan: Plan, name: str) -> _Built:
        import torch

        state = {p.name: torch.empty(p.shape, dtype=getattr(torch, p.dtype.torch)) for p in plan.programs}
        self._refill(plan, set(state), _Built(None, state))
        module = self._construct(plan, name, state)
        return _Built(module, _places(module, state))

    def _construct(self, plan: Plan, name: str, state: dict[str, Any]) -> Any:
        if self._builder is None:
            hint = "--module FILE.py:FUNCTION builds any module"
            return load_state(name, plan.config, dict(state), hint=hint, dtype=self._dtype).to(self.device)
        module = self._builder(plan.config or {})
        own = module.state_dict()
        for given, known, what in ((own, state, "lacks"), (state, own, "has a tensor that the module does not know:")):
            lost = [n for n in given if n not in known]
            if lost:
                raise Refused(
                    f"{name}: {what} `{lost[0]}` ({len(lost)} in all)", hint="the module must name its tensors as the file"
                )
        for key, value in state.items():
            if own[key].shape != value.shape:
                raise Refused(f"{name}: `{key}` is {list(value.shape)}, the module's is {list(own[key].shape)}")
        module.load_state_dict(state)
        if self._dtype is not None:
            import torch

            module = module.to(getattr(torch, self._dtype))
        return module.to(self.device).eval()

    def _files(self, plan: Plan) -> Path | None:
        """The directory that holds the output's tokenizer."""
        if plan.donor is None:
            return None
        vocabulary = plan.settings.vocabulary
        tokenizer = next((u.source for u in plan.uses if u.source.label == plan.settings.tokenizer), plan.donor)
        if vocabulary is None:
            return tokenizer.directory
        key = f"{vocabulary.identity}\0{plan.donor.fingerprint}"
        if key not in self._written:
            folder = self._written[key] = tempfile.TemporaryDirectory(prefix="surgery-tokenizer-")
            copy_sidecars(plan.donor, vocabulary.source or tokenizer, Path(folder.name))
            vocabulary.write(Path(folder.name), plan.donor)
            write_json(Path(folder.name) / "config.json", plan.config or {})
        return Path(self._written[key].name)


def _places(module: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Name in the checkpoint -> the parameter or buffer that holds it, for all that can be told for certain.

    Names may differ by what stands in front (`model.layers.0…`, `layers.0…`). What the model fused from several tensors, or
    keeps in another form, has no place: when it changes, the module is built anew.
    """
    import torch

    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    made: dict[str, Any] = {}
    for name, value in state.items():
        near = [name] if name in own else [n for n in own if n.endswith("." + name) or name.endswith("." + n)]
        if len(near) != 1 or own[near[0]].shape != value.shape:
            continue
        place = own[near[0]]
        if place.device.type == "meta" or not torch.equal(place.data.cpu(), value.to(place.dtype)):
            continue
        made[name] = place
    holders = [p.data.untyped_storage().data_ptr() for p in made.values() if p.numel()]
    return made if len(set(holders)) == len(holders) else {n: p for n, p in made.items() if _alone(p, holders)}


def _alone(place: Any, holders: list[int]) -> bool:
    """True unless several tensors of the checkpoint would be written to this one place."""
    return holders.count(place.data.untyped_storage().data_ptr()) == 1


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as problem:
        raise Refused(
            f"--device {name}: not to be had here: {(str(problem).splitlines() or [''])[0]}", hint="leave it out"
        ) from None
    return name
