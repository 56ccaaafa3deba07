"""The plan with pipeline stages, where it is better than the best one without.

Under an expert load pipelines are found for a balanced router; then their experts are placed by name.
"""

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.by_name.expert_load import load_notes
from hetermoe_cli.planner.cluster.explained import binding_of_groups
from hetermoe_cli.planner.cluster.loaded import Loaded, groups_under_load, numbered_under_load
from hetermoe_cli.planner.cluster.objective import Wanted, economy, least_dollars, merit, priced_bound
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.pipelines.bound import pipeline_bound
from hetermoe_cli.planner.pipelines.layouts import NEAR, Found, Setups, best_pipelines, plain_pipelines
from hetermoe_cli.planner.pipelines.parts import promising_parts, whole_setups
from hetermoe_cli.planner.pipelines.told import lost_pipelines, not_chosen, pipeline_notes, without_stages
from hetermoe_cli.planner.reasons.explain import sources
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.explanation import Explanation
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Assignment, Bound, Group, LoadReport, Plan, Prediction, SolverReport, ranks_in

WORTH = 0.01  # of the iteration, or its dollars: by how much pipelines, or several groups, must be better
NONE_FITS = "no pipeline fits as a plan: into memory, into --max-groups, or with NICs of its own"
REPLAYED = 3  # parts of the cluster, where dollars count
PATIENCE = 10.0  # seconds to look at parts where nothing fits otherwise
SHARE = 0.3  # of the time limit, beside what other plans take
SHARE_OF_NODES = 0.15  # the same where units are whole nodes: each replay takes longer, and the others get the rest


@dataclass(frozen=True)
class Chosen:
    """Groups with pipeline stages, the seconds of an iteration, and what these are by the objective; under an expert
    load, what is to be told of it. `others`: pipelines that lost."""

    seconds: float
    groups: list[Group]
    merit: float
    load: LoadReport | None = None
    others: Sequence[Found] = ()


@dataclass(frozen=True)
class PipelineSearch:
    """What pipelines are looked for. `limit`: the largest R of layouts, for the bound; `explain`: also find out why
    other plans lost."""

    cost: CostModel
    wanted: Wanted
    solver: SolverOptions
    limit: int
    explain: bool = False

    def instead_of(self, plan: Plan, rivals: Setups, seconds_left: float) -> Plan:
        """Pipelines that are clearly better than `plan`, or that were asked for (assignment pp: the first of `rivals`
        that fits); else the plan, and why not where pp is faster."""
        began = time.monotonic()
        if plan.assignment == "pp":
            return self._replaced(plan, self._pp(plan, rivals), began)
        against, found = reason_against(self.cost, plan.assignment, self.wanted), None
        if not against:
            known = self._merit(plan.groups, plan.predicted.iteration_seconds)
            found = self._search(known, seconds_left)
            if found and found.merit < (1 - WORTH) * known:
                return self._replaced(plan, found, began)
        replayed = f"as a plan it would take {found.seconds:.3f} s" if found else NONE_FITS
        return plan.model_copy(update={"notes": [*plan.notes, *not_chosen(plan, against or replayed)]})

    def alone(self, inputs: Inputs) -> Plan | None:
        """The best pipelines where no plan without fits, if any do. `inputs`: what the plan keeps of the cost's."""
        began = time.monotonic()
        if reason_against(self.cost, "optimal", self.wanted):
            return None
        found = self._search(inf, SHARE * self.solver.time_limit)
        if not found:
            return None
        base = {
            "assignment": "optimal",
            "objective": self.wanted.objective,
            "baselines": {},
            "solver": SolverReport(name=self.solver.name, status="feasible", seconds=0.0),
            "inputs": inputs,
            "inputs_sha256": inputs.hashes(),
        }
        return self._planned(base, "no plan without a pipeline fits", found, began, None)

    def _merit(self, groups: Sequence[Group], seconds: float) -> float:
        return merit(self.cost.inputs.cluster, self.wanted, ranks_in(groups), seconds)

    def _search(self, known: float, seconds_left: float) -> Chosen | None:
        """The best pipelines by the objective, which should be less than `known`."""
        if self.wanted.needs_prices:
            parts = promising_parts(self.cost, self.wanted, known, NEAR, seconds_left)
        else:
            parts = [whole_setups(self.cost.balanced, NEAR * known, self.wanted.most_groups, seconds_left)]
        found = self._on_parts(parts, seconds_left)
        if not found and known == inf:  # what is estimated to fit need not: any part, however slow
            found = self._on_parts(promising_parts(self.cost, self.wanted, inf, inf, PATIENCE), seconds_left)
        return min(found, key=lambda one: one.merit, default=None)

    def _on_parts(self, parts: Sequence[Setups], seconds_left: float) -> list[Chosen]:
        """The best of the first parts that have any that fits; of no more than one once the time is gone."""
        found: list[Chosen] = []
        end = time.monotonic() + seconds_left
        for setups in parts:
            if len(found) == REPLAYED or (found and time.monotonic() > end):
                break
            best = self.best(setups, seconds_left / min(REPLAYED, len(parts)))
            found += [best] if best else []
        return found

    def best(self, setups: Setups, seconds_left: float) -> Chosen | None:
        """The best of `setups` that fits; under an expert load, of those for a balanced router the first that
        does."""
        found = best_pipelines(self.cost.balanced, setups, seconds_left)
        for seconds, groups in sorted(found, key=lambda one: self._merit(one[1], one[0])):
            loaded = Loaded(groups, seconds, None)
            if self.cost.inputs.expert_load:
                try:
                    loaded = groups_under_load(self.cost, groups, seconds, self.solver)
                except UserError as error:
                    if error.code is not ExitCode.DOES_NOT_FIT:
                        raise
                    continue
            others = [other for other in found if other[1] is not groups]
            value = self._merit(loaded.groups, loaded.seconds)
            return Chosen(loaded.seconds, loaded.groups, value, loaded.report, others)
        return None

    def _pp(self, plan: Plan, setups: Setups) -> Chosen:
        """The rival itself, its experts placed by number. UserError if it does not fit, or cannot be what was asked
        for."""
        if against := reason_against(self.cost, "optimal", Wanted()):
            raise UserError(f"assignment pp: {against}: plan it without")
        found = plain_pipelines(self.cost.balanced, setups)
        if not found:
            rival = plan.baselines["pp"]
            raise UserError(f"assignment pp: {NONE_FITS if setups else rival.reason}", ExitCode.DOES_NOT_FIT)
        if self.cost.inputs.expert_load is None:
            seconds, groups = found[0]
            return Chosen(seconds, groups, seconds)
        loaded = [numbered_under_load(self.cost, groups, seconds) for seconds, groups in found]
        fastest = min(loaded, key=lambda one: one.seconds)
        if fastest.seconds == inf:
            raise UserError(
                "assignment pp: fits with a balanced router, but with its experts by number not under the expert load: "
                "plan with --assignment optimal, which places them by name, or add memory",
                ExitCode.DOES_NOT_FIT,
            )
        return Chosen(fastest.seconds, fastest.groups, fastest.seconds, fastest.report)

    def _replaced(self, plan: Plan, chosen: Chosen, began: float) -> Plan:
        """The plan of what was chosen, with the rivals of `plan`, which it replaces."""
        return self._planned(dict(plan), without_stages(plan, self.wanted), chosen, began, plan)

    def _planned(self, base: dict[str, Any], told: str, chosen: Chosen, began: float, beaten: Plan | None) -> Plan:
        """The plan of what was chosen with the other fields of `base`; `told`: of plans without a pipeline."""
        cost, wanted, limit = self.cost, self.wanted, self.limit
        seconds, groups, load = chosen.seconds, chosen.groups, chosen.load
        replayed = replay_groups(cost.inputs, groups, cost)
        world, used, bound = len(cost.devices), ranks_in(groups), pipeline_bound(cost, limit)
        paid = economy(cost, used, seconds, limit, stages=True)
        if wanted.needs_prices:
            bound = priced_bound(bound, least_dollars(cost, limit, stages=True), wanted, paid)
        explanation = binding_of_groups(replayed)
        if self.explain:
            explanation = self._explained(explanation, chosen, beaten)
        solver = base["solver"]
        spent = solver.seconds + time.monotonic() - began
        changes = {
            "date": datetime.date.today(),
            "max_groups": wanted.most_groups,
            "groups": groups,
            "predicted": Prediction.of(cost.train, seconds, replayed.busy_share(world), replayed.seconds),
            "bound": Bound(iteration_seconds=bound, work_iteration_seconds=bound, exact_over="not solved"),
            "gap": max(0.0, 1 - bound / seconds),
            "one_group": None,
            "memory": replayed.memory(cost),
            "economy": paid,
            "solver": solver.model_copy(update={"status": "feasible", "seconds": spent}),
            "load": load,
            "explanation": explanation,
            "notes": [
                *sources(cost),
                *pipeline_notes(cost, groups, used, wanted, told),
                *(load_notes(load) if load else []),
            ],
        }
        return Plan.model_validate({**base, **changes})

    def _asked(self, beaten: Plan | None) -> str:
        """Why a plan that takes less time was not chosen."""
        if beaten and beaten.assignment == "pp":
            return "pp was asked for"
        return "it trains fewer tokens a dollar" if self.wanted.objective == "cost" else "it is hardly faster"

    def _explained(self, explanation: Explanation, chosen: Chosen, beaten: Plan | None) -> Explanation:
        # under a load others are known for a balanced router only
        others = () if chosen.load else chosen.others
        lost = lost_pipelines(
            self.cost, explanation, chosen.seconds, chosen.groups, others, beaten, self._asked(beaten)
        )
        return explanation.model_copy(update={"runner_ups": lost})


def reason_against(cost: CostModel, assignment: Assignment, wanted: Wanted) -> str:
    """Why no pipelines are looked at; empty where they are."""
    if assignment != "optimal":
        return f"assignment {assignment} was asked for"
    if not wanted.stages:
        return "--no-pipeline was asked for"
    if cost.train.dense_state == "full":
        return "its stages cannot share out all of the dense part, as dense_state full asks for"
    return ""
