"""Learning which entries of a fine-tune carry its skill (Panigrahi et al. 2023, arXiv 2302.06600, section 3).

    theta = base + gamma (tuned - base),   gamma = b + (1 - 2 b) sigmoid(S - bias)
    S <- S - lr (1 - 2 b) mean over batches[dL/dtheta (tuned - base)] sigmoid' (S - bias)

b is the base patch: the entries that moved most. S starts uniform in (0, 1), so gamma starts as b. After every step gamma is
rounded, and that graft is a trial of the sweep; the best one's mask is written, as a statistics checkpoint of kind "mask".
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.ties import is_token_embedding
from surgery.engine.compute import compute_all
from surgery.engine.plan import make_plan
from surgery.errors import Refused
from surgery.graph.node import Node, sources_of
from surgery.graph.values import matches
from surgery.inputs import open_node
from surgery.lab.learnt import Learn
from surgery.lab.losses import Examples, examples
from surgery.lab.resident import Resident
from surgery.lab.space import Search
from surgery.lab.trials import Trials
from surgery.statistics.manifest import Manifest, content_digest
from surgery.statistics.texts import file_digest
from surgery.version import __version__

STATE = "learning.pt"
MASK = "mask"


def masks(
    search: Search, recipe: Path, trials: Trials, resident: Resident, folder: Path, judged: Callable[[Any], Any]
) -> dict[str, Any]:
    """Learn the mask; a trial after every step, of the rounded graft. judged: evaluates a live model. What the report says.

    The mask of the best trial is written to `folder`/mask, where the recipe looks for it.
    """
    learn = search.learn
    assert learn is not None
    graft = Graft(search.beside(search.said["base"]), search.beside(search.said["tuned"]), resident, learn, search.seed)
    by_name = {t.name: t for t in search.tasks}
    given = [examples(by_name[name], graft.subject, learn.split) for name in learn.tasks]
    at, best, problem = graft.load(folder / STATE)
    kept = best
    for step in range(learn.steps + 1):
        if step < at[0]:
            trials.evaluate({"step": step, "share": at[1][step]})  # evaluated before: known
            continue
        if step and problem is None and step > at[0]:
            problem = graft.step(given, learn, search.seed, step)
        if problem is not None:
            break
        kept = graft.rounded()
        share = round(graft.share(kept), 6)
        graft.show(kept)
        trial = trials.evaluate({"step": step, "share": share}, judge=lambda: judged(graft.subject))
        at = step, [*at[1][:step], share]
        best = kept if trials.best is trial or best is None else best
        graft.save(folder / STATE, at, best, problem)
    if best is None:
        raise Refused(f"learn: {problem}")
    graft.write(folder / MASK, best, search, sum(map(len, given)))
    made = {"loss": learn.loss, "split": learn.split, "tasks": list(learn.tasks), "entries": graft.size, "steps": at[0],
            "base_patch": learn.density, "excluded": sorted(graft.excluded), "whole": sorted(graft.whole)}  # fmt: skip
    return made | ({"stopped": problem} if problem else {})


class Graft:
    """A live model between base and fine-tune, entry by entry. Raises Refused for models that do not go together."""

    def __init__(self, base: str, tuned: str, resident: Resident, learn: Learn, seed: int) -> None:
        import torch

        below, above = open_node(base), open_node(tuned)
        self._source, self._location = sources_of(above)[0].source, tuned
        plan = make_plan(above)
        live = resident.like(dtype="float32")
        self.subject = live.show(plan, tuned)
        floats = [p.name for p in plan.programs if p.dtype.is_float]
        common = [n for n in floats if n in below.tensors and below.tensors[n].shape == above.tensors[n].shape]
        self._shapes = {n: above.tensors[n].shape for n in floats}
        self.whole = {n for n in floats if any(matches(g, n) for g in learn.whole)}
        self.excluded = {n for n in common if n not in self.whole and _excluded(n, above, learn)}
        alien = next((n for n in floats if n not in common and n not in self.whole), None)
        if alien is not None:
            raise Refused(f"`{alien}` of {tuned} has no counterpart in {base}", hint="learn: {whole: [GLOB]} takes it as it is")
        self.names = [n for n in common if n not in self.excluded and n not in self.whole]
        if not self.names:
            raise Refused("learn: nothing is left to graft", hint="exclude and whole name too much")
        lost = next((n for n in self.names if n not in live.places), None)
        if lost is not None:
            raise Refused(f"`{lost}` has no place of its own in the live model", hint="learn: {exclude: [GLOB]} leaves it out")
        device = live.device
        self._base = {n: v.float().to(device) for n, v in compute_all({n: below.tensors[n] for n in common}).items()}
        self._tuned = {n: v.float().to(device) for n, v in compute_all({n: above.tensors[n] for n in self.names}).items()}
        self._places = {n: live.places[n] for n in common if n in live.places}
        self.size = sum(self._tuned[n].numel() for n in self.names)
        self._bias = learn.bias
        self._patch = self._most_moved(learn.density)
        draw = torch.Generator().manual_seed(seed)
        self._free = {n: torch.rand(self._tuned[n].shape, generator=draw).to(device) for n in self.names}
        for p in self.subject.module.parameters():
            p.requires_grad_(False)
        for n in self.names:
            self._places[n].requires_grad_(True)
        with torch.no_grad():
            for n in self.excluded & self._places.keys():
                self._places[n].data.copy_(self._base[n])

    def _most_moved(self, share: float) -> dict[str, Any]:
        """The base patch: exactly int(share n) entries, at least one; of equal ones the first."""
        import torch

        moved = torch.cat([(self._tuned[n] - self._base[n]).abs().reshape(-1) for n in self.names])
        count = max(1, int(share * len(moved)))
        flat = torch.zeros(len(moved), dtype=torch.bool, device=moved.device)
        flat[torch.sort(moved, descending=True, stable=True).indices[:count]] = True
        return {n: b.reshape(self._tuned[n].shape) for n, b in zip(self.names, self._split(flat), strict=True)}

    def _split(self, flat: Any) -> Any:
        return flat.split([self._tuned[n].numel() for n in self.names])

    def _gate(self, name: str) -> tuple[Any, Any, Any]:
        """(gamma, 1 - 2 b, sigmoid(S - bias))."""
        import torch

        patch, soft = self._patch[name].float(), torch.sigmoid(self._free[name] - self._bias)
        turn = 1.0 - 2.0 * patch
        return patch + turn * soft, turn, soft

    def rounded(self) -> dict[str, Any]:
        """The mask as it is now: True where gamma is above one half."""
        return {n: self._gate(n)[0] > 0.5 for n in self.names}

    def share(self, mask: Mapping[str, Any]) -> float:
        return sum(int(m.sum()) for m in mask.values()) / self.size

    def show(self, mask: Mapping[str, Any]) -> None:
        """Put the graft of a mask into the module: what the operator `graft` gives, to the bit."""
        import torch

        with torch.no_grad():
            for n, m in mask.items():
                self._places[n].data.copy_(torch.where(m, self._tuned[n], self._base[n]))

    def step(self, given: list[Examples], learn: Learn, seed: int, number: int) -> str | None:
        """One step of gradient descent on S. Says what is wrong where the loss is not finite; S is then as it was."""
        import torch

        with torch.no_grad():
            for n in self.names:
                self._places[n].grad = None
                self._places[n].data.copy_(torch.lerp(self._base[n], self._tuned[n], self._gate(n)[0]))
        total, count = 0.0, 0
        with torch.inference_mode(False), torch.enable_grad():
            for one, rows in _batches(given, learn, seed, number):
                loss = one.loss(rows, learn.loss)
                loss.backward()
                total, count = total + float(loss.detach()), count + 1
        grads = {n: self._places[n].grad for n in self.names}
        finite = math.isfinite(total) and all(g is None or bool(torch.isfinite(g).all()) for g in grads.values())
        if not finite:
            return f"step {number}: the loss or its gradient is not finite"
        with torch.no_grad():
            for n, grad in grads.items():
                if grad is not None:
                    _, turn, soft = self._gate(n)
                    pull = (self._tuned[n] - self._base[n]).mul_(grad).mul_(turn).mul_(soft * (1.0 - soft))
                    self._free[n].sub_(pull, alpha=learn.lr / count)
                self._places[n].grad = None
        return None

    # -- kept and written ------------------------------------------------------------------------------------------------

    def save(self, path: Path, at: tuple[int, list[float]], best: Mapping[str, Any], problem: str | None) -> None:
        import torch

        part = path.with_suffix(".partial")
        torch.save({"step": at[0], "shares": at[1], "free": self._free, "best": dict(best), "problem": problem}, part)
        part.replace(path)

    def load(self, path: Path) -> tuple[tuple[int, list[float]], dict[str, Any] | None, str | None]:
        """((step that is done, shares up to it), best mask, what stopped it) of a sweep that goes on."""
        import torch

        if not path.exists():
            return (0, []), None, None
        saved = torch.load(path, weights_only=True, map_location=self.subject.device)
        self._free = saved["free"]
        return (saved["step"], saved["shares"]), saved["best"], saved["problem"]

    def write(self, folder: Path, mask: Mapping[str, Any], search: Search, seen: int) -> None:
        """A statistics checkpoint of kind "mask": 1 where the fine-tune's entry is taken, one byte each; whole tensors are
        all ones, what it lacks is the base's."""
        import torch
        from safetensors.torch import save_file

        part = folder.with_name(folder.name + ".partial")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        tensors = {n: m.cpu() for n, m in mask.items()}
        tensors |= {n: torch.ones(self._shapes[n], dtype=torch.bool) for n in self.whole}
        kind = torch.float8_e4m3fn  # holds 0 and 1 exactly
        save_file({n: t.float().to(kind).contiguous() for n, t in sorted(tensors.items())}, part / "model.safetensors")
        Manifest(
            kind="mask", samples=seen, tokens=sum(int(m.sum()) for m in mask.values()), length=0, seed=search.seed,
            model={"source": self._location, "headers": self._source.fingerprint, "content": content_digest(self._source)},
            data={"file": search.tasks_path.name, "sha256": file_digest(search.tasks_path)}, version=__version__,
        ).write(part)  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def _excluded(name: str, node: Node, learn: Learn) -> bool:
    """By default token embeddings, and layers with a matrix after the blocks: heads and poolers."""
    if learn.exclude is not None:
        return any(matches(g, name) for g in learn.exclude)
    if is_token_embedding(name):
        return True
    structure = node.structure
    if not structure.towers or structure.block(name) is not None or structure.position(name) < 1.0:
        return False
    layer = name.rpartition(".")[0]
    return any(len(e.shape) > 1 for n, e in node.tensors.items() if n.rpartition(".")[0] == layer)


def _batches(given: list[Examples], learn: Learn, seed: int, step: int) -> Iterator[tuple[Examples, list[int]]]:
    """Up to `batches` batches of each task, a shuffled pass over its examples."""
    import numpy as np

    for i, one in enumerate(given):
        order = np.random.default_rng([seed, step, i]).permutation(len(one))
        for a in range(0, min(len(one), learn.batches * learn.batch), learn.batch):
            yield one, order[a : a + learn.batch].tolist()
