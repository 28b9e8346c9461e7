"""Properties of every rewrite, checked on 60 random models, in CI on 200; ``make nightly`` checks 2,000."""

import io
import os

import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_rewrites, assert_same_results
from tests.generated import Plan, exported, has_kernel, inputs, plans

EXAMPLES = int(os.environ.get("GENERATED") or (200 if os.environ.get("CI") else 60))

# Three layers one after the other at most, each within one unit in the last place of bf16; with a kernel in float32, or
# a folded weight, only the order of additions differs.
RTOL = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-15}


def saved(program: ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


# The phase that explains a failure is omitted: it runs a shrunk model some hundred times.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]


@settings(max_examples=EXAMPLES, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(plans())
def test_random_models_keep_their_results_and_get_promised_outcomes(plan: Plan) -> None:
    program, reads = exported(plan)
    passes = ecp.default_passes(plan.target)
    if plan.fused and plan.target != "xnnpack":
        passes = [ecp.FusedLinearInt4(), *(rule for rule in passes if rule.name != "fused_linear_int4")]
    rtol = RTOL[plan.dtype]
    # Runs both programs, compares outputs, buffers and inputs, and rewrites the result a second time.
    rewritten, report = assert_rewrites(program, plan.target, passes, {}, inputs(plan), rtol)
    assert_same_results(rewritten, program, inputs(plan, seed=1, rows=5, sign=-1), rtol, report)

    assert len({outcome.node for outcome in report.outcomes}) == len(report.outcomes)
    assert all(outcome.reasons for outcome in report.outcomes if outcome.status == "missed")
    if not (plan.decomposed and any(step.unused for step in plan.steps)):  # a decomposition removes dead code
        assert len(report.outcomes) == len(reads), report
        promised = [has_kernel(read, plan) for read in reads]
        assert promised.count(True) <= report.counts()["rewritten"] <= len(promised) - promised.count(False), report

    again, same_report = ecp.rewrite(program, plan.target, passes)
    assert same_report.to_json() == report.to_json()
    assert saved(again) == saved(rewritten)
