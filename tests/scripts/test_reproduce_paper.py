"""The reproduction: batches, means, trends, and the page that it rewrites. Its figures take a minute: not here."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import paper_figures
import paper_points
import paper_trends
import reproduce_paper
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.planner.baselines.even import even_placement
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from paper_points import Case, Point, cost_of, model_of, point, setup_of, unit_of

CASE = Case()


@pytest.mark.parametrize(("setup", "batch"), [("O1", 48), ("O2", 36), ("O3", 54), ("C1", 16), ("C2", 20)])
def test_batches_can_be_shared_by_attention_gpus_and_by_all(setup: str, batch: int) -> None:
    at = point(Case(per_attention_gpu=8), setup, "D1", 4)
    assert at.batch == batch
    assert batch % at.gpus[0][1] == batch % sum(count for _, count in at.gpus) == 0


def test_a_batch_is_as_large_as_memory_allows() -> None:
    unit = unit_of(setup_of("O1")[0])
    short, long = point(CASE, "O1", "D1", 8), point(CASE, "O1", "D1", 32)
    assert short.batch > 4 * long.batch >= 4 * unit
    for sequences, fits in ((short.batch, True), (short.batch + unit, False)):
        cost = cost_of(replace(short, batch=sequences))
        schedule = ScheduleChoice.zebra(sequences // 12, recompute="all")
        layout = Layout(schedule=schedule, sequences_per_rank=[1] * 12, placement=even_placement(cost))
        assert (overflow(LayoutCost(cost, layout)) is None) is fits


def test_experts_are_scaled_with_the_v100() -> None:
    for old in paper_trends.OLD_COUNTS:
        assert model_of(paper_points.ratio_point(CASE, old, 4).model).experts == 4 * old


def test_a_pipeline_has_the_paper_s_stages() -> None:
    assert paper_points.run(point(CASE, "O1", "D1", 32), "pp").reason.split(", ")[2] == "6 x 2 stages"
    assert paper_points.run(point(CASE, "O2", "D1", 32), "pp").reason.split(", ")[2] == "4 x 3 stages"


def test_a_point_is_what_section_5_says() -> None:
    cost = cost_of(point(CASE, "C2", "D3", 4))
    assert [d.type for d in cost.devices] == ["L40S"] * 2 + ["T4"] * 8
    assert len({d.nic for d in cost.devices}) == 10
    assert (cost.model.name, cost.train.recompute, cost.train.precision) == ("mixtral-d3", "all", "fp16")
    assert cost.train.sequence_length == 4096
    assert model_of("D1-8").experts == 8


def test_the_greedy_cannot_act_where_counts_do_not_divide() -> None:
    assert paper_points.moved(paper_points.ratio_point(CASE, 3, 4)) == 0
    assert paper_points.moved(point(CASE, "O1", "D1", 4)) > 0


def test_ep_is_faster_the_more_it_overlaps() -> None:
    at = [point(Case(overlap, 8), "O1", "D1", 4) for overlap in ("none", "parts", "micro_batches")]
    seconds = [paper_points.run(one, "ep").seconds for one in at]
    assert seconds[0] > seconds[1] > seconds[2]
    assert len({paper_points.run(one, "hetermoe").seconds for one in at}) == 1


def test_attention_over_experts_grows_with_the_length() -> None:
    shares = [paper_trends.attention_share(length)(Case(per_attention_gpu=8)) for length in (4, 20)]
    assert shares[0] is not None
    assert shares[1] is not None
    assert 0 < shares[0] < shares[1]


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> dict[int, float | None]:
    """Speed-ups by length instead of simulated ones."""
    made: dict[int, float | None] = {4: 1.0, 8: 2.0, 12: 4.0, 16: None}

    def speed_up(at: Point, over: str) -> float | None:
        return made.get(at.kilotokens)

    monkeypatch.setattr(paper_figures, "speed_up", speed_up)
    return made


def test_means_leave_out_what_does_not_fit(ratios: dict[int, float | None]) -> None:
    assert paper_figures.average("ep", [("O1", "D1")])(CASE) == pytest.approx(7 / 3)
    assert paper_figures.inverse("ep", [("O1", "D1")])(CASE) == pytest.approx(3 / (1 + 1 / 2 + 1 / 4))
    assert paper_figures.extreme(max, "ep", [("O1", "D1")])(CASE) == 4
    assert paper_figures.average("ep", [("O1", "D1")], [16])(CASE) is None


def test_trends_need_strict_order_and_all_values(ratios: dict[int, float | None]) -> None:
    at = {k: paper_figures.at("O1", "D1", k, "ep") for k in ratios}
    assert paper_trends.rising(0.5, at[4], at[8])(CASE)
    assert not paper_trends.rising(at[8], at[4])(CASE)
    assert not paper_trends.rising(at[4], at[4])(CASE)
    assert not paper_trends.rising(at[4], at[16])(CASE)
    assert paper_trends.extreme_at(max, ("O1", "D1"), "ep", 12)(CASE)
    assert not paper_trends.extreme_at(max, ("O1", "D1"), "ep", 8)(CASE)


@pytest.mark.parametrize(("ours", "inside"), [(1.0, True), (1.15, True), (1.16, False), (0.84, False), (None, False)])
def test_within_fifteen_percent(ours: float | None, inside: bool) -> None:
    figure = paper_figures.Figure("one", 1.0, lambda case: ours)
    assert reproduce_paper.within(figure, ours) is inside


def test_only_the_tables_of_the_page_are_rewritten() -> None:
    page = "before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n"
    assert reproduce_paper.rewrite(page, "a \\1 b") == page.replace("old", "a \\1 b")
    with pytest.raises(SystemExit):
        reproduce_paper.rewrite("no marks", "new")


def test_the_page_has_every_figure_and_trend() -> None:
    page = reproduce_paper.PAGE.read_text()
    for row in [*paper_figures.FIGURES, *paper_trends.TRENDS]:
        assert f"| {row.name} |" in page
