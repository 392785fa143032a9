"""Requests, steps and branches, told by a scheduler, by the caller, or guessed from what a loop passes."""

import math

import pytest
import torch

from ditopt.errors import SessionError
from ditopt.runtime.clock import BRANCHES, Clock


def latents(count, shape=(2, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


COND, UNCOND = (torch.full((2,), 1.0),), (torch.full((5,), 2.0),)  # prompts of different lengths are branches too


def run(clock, times, prompts=(COND,), xs=None, after=None):
    """One loop: at each time one call a prompt. -> [[tick a prompt] a step]"""
    xs = xs or latents(len(times))
    ticks = []
    for i, (t, x) in enumerate(zip(times, xs, strict=True)):
        ticks.append([clock.tick(t, x, p) for p in prompts])
        if after:
            after(i)
    return ticks


def steps(ticks):
    return [[t.step for t in row] for row in ticks]


def requests(ticks):
    return sorted({t.request for row in ticks for t in row})


@pytest.mark.parametrize("times", [[1000, 700, 300], [0.0, 0.3, 0.9]])
def test_a_loop_counts_its_steps_in_either_direction(times):
    clock = Clock()
    first = run(clock, times)
    second = run(clock, times)
    assert steps(first) == steps(second) == [[0], [1], [2]]
    assert (requests(first), requests(second)) == ([1], [2])
    assert first[0][0].opened
    assert second[0][0].opened == "the time broke its direction"
    assert not first[1][0].opened


@pytest.mark.parametrize("prompts", [(COND, UNCOND), (UNCOND, COND), (COND, UNCOND, (torch.zeros(2),))])
def test_guidance_in_separate_calls(prompts):
    clock = Clock()
    ticks = run(clock, [3, 2, 1], prompts)
    assert steps(ticks) == [[s] * len(prompts) for s in range(3)]
    assert requests(ticks) == [1]
    for row in ticks:
        assert len({t.branch for t in row}) == len(prompts)
        assert [t.branch for t in row] == [t.branch for t in ticks[0]]


def test_the_order_of_the_branches_may_change_from_step_to_step():
    clock, xs = Clock(), latents(2)
    a, b = clock.tick(3, xs[0], COND), clock.tick(3, xs[0], UNCOND)
    b2, a2 = clock.tick(2, xs[1], UNCOND), clock.tick(2, xs[1], COND)
    assert (a.branch, b.branch) == (a2.branch, b2.branch)
    assert (a2.step, b2.step, a2.request) == (1, 1, 1)


def test_branches_without_prompts_are_told_by_order():
    ticks = run(Clock(), [3, 2, 1], ((), ()))
    assert steps(ticks) == [[0, 0], [1, 1], [2, 2]]
    assert ticks[0][0].branch != ticks[0][1].branch
    assert [t.branch for t in ticks[0]] == [t.branch for t in ticks[2]]


def test_prompts_made_again_each_step_with_equal_content():
    clock = Clock()
    ticks = [
        [clock.tick(t, x, tuple(p.clone() for p in prompt)) for prompt in (COND, UNCOND)]
        for t, x in zip([3, 2, 1], latents(3), strict=True)
    ]
    assert steps(ticks) == [[0, 0], [1, 1], [2, 2]]
    assert [t.branch for t in ticks[0]] == [t.branch for t in ticks[2]]
    assert clock.reads > 0


def test_a_prompt_with_nan_padding_equals_itself():
    prompt = torch.tensor([1.0, math.nan])
    clock = Clock()
    ticks = [[clock.tick(t, x, (prompt.clone(),))] for t, x in zip([3, 2], latents(2), strict=True)]
    assert steps(ticks) == [[0], [1]]


def test_the_same_prompt_tensors_are_told_without_reading():
    clock = Clock()
    run(clock, [3, 2, 1], (COND, UNCOND))
    assert clock.reads == 0


def test_a_prompt_buffer_that_is_refilled():
    clock, xs = Clock(), latents(3)
    prompt = torch.ones(4)
    assert clock.tick(3, xs[0], (prompt,)).step == 0
    prompt.copy_(torch.ones(4))  # the same content again
    assert clock.tick(2, xs[1], (prompt,)).step == 1
    prompt.fill_(2)
    tick = clock.tick(1, xs[2], (prompt,))
    assert (tick.step, tick.opened) == (0, "the prompt changed")


def test_a_new_prompt_opens_a_request():
    clock, xs = Clock(), latents(4)
    run(clock, [3, 2], xs=xs[:2])
    tick = clock.tick(1, xs[2], UNCOND)
    assert (tick.request, tick.step, tick.opened) == (2, 0, "the prompt changed")


def test_a_guidance_interval():
    clock, xs = Clock(), latents(4)
    run(clock, [4, 3], xs=xs[:2])
    cond, uncond = clock.tick(2, xs[2], COND), clock.tick(2, xs[2], UNCOND)
    assert (cond.step, uncond.step, uncond.request) == (2, 2, 1)
    assert cond.branch != uncond.branch
    assert clock.tick(1, xs[3], COND).step == 3


def test_heun_evaluates_times_twice():
    clock, xs = Clock(), latents(5)
    ticks = run(clock, [4, 3, 3, 2, 2], (COND, UNCOND), xs)
    assert steps(ticks) == [[s, s] for s in range(5)]
    assert requests(ticks) == [1]


def test_heun_with_the_branches_in_another_order():
    clock, xs = Clock(), latents(3)
    clock.tick(4, xs[0], COND), clock.tick(4, xs[0], UNCOND)
    clock.tick(3, xs[1], COND), clock.tick(3, xs[1], UNCOND)
    b, a = clock.tick(3, xs[2], UNCOND), clock.tick(3, xs[2], COND)
    assert (a.step, b.step, a.request) == (2, 2, 1)


def test_a_sampler_that_writes_into_its_latent():
    clock, x = Clock(), torch.zeros(3)
    assert clock.tick(4, x).step == 0
    for t, step in [(3, 1), (3, 2), (2, 3)]:
        x.add_(1)
        assert clock.tick(t, x).step == step


def test_cancelled_after_the_first_step():
    clock = Clock()
    run(clock, [4], (COND, UNCOND))
    ticks = run(clock, [4, 3], (COND, UNCOND), latents(2, seed=1))
    assert steps(ticks) == [[0, 0], [1, 1]]
    assert requests(ticks) == [2]
    assert ticks[0][0].opened == "its first time came again with a new latent"


def test_cancelled_midway():
    clock = Clock()
    run(clock, [4, 3], (COND, UNCOND))
    ticks = run(clock, [4, 3], (COND, UNCOND), latents(2, seed=1))
    assert steps(ticks) == [[0, 0], [1, 1]]
    assert requests(ticks) == [2]


def test_a_new_resolution_midway():
    clock = Clock()
    run(clock, [4, 3])
    tick = clock.tick(2, torch.zeros(4, 4), COND)
    assert (tick.request, tick.step) == (2, 0)
    assert "shape" in tick.opened


def test_the_same_call_again_and_again_is_no_guidance():
    clock, x = Clock(), torch.zeros(3)
    ticks = [clock.tick(4, x, COND) for _ in range(BRANCHES + 1)]
    assert {t.request for t in ticks[:BRANCHES]} == {1}
    assert len({t.branch for t in ticks[:BRANCHES]}) == BRANCHES
    assert ticks[-1].request == 2
    assert "more than 8 times" in ticks[-1].opened


def test_contexts_name_the_branches():
    clock = Clock()

    def call(name, t, x):
        clock.context = name
        return clock.tick(t, x, COND)  # one prompt for both: perturbed attention guidance

    xs = latents(2)
    first = [call("cond", 3, xs[0]), call("uncond", 3, xs[0])]
    second = [call("uncond", 2, xs[1]), call("cond", 2, xs[1])]
    assert first[0].branch == second[1].branch != first[1].branch == second[0].branch
    assert [t.step for t in second] == [1, 1]


def test_inference_tensors():
    clock = Clock()
    with torch.inference_mode():
        prompt, xs = torch.ones(3), latents(4)
        assert xs[0].is_inference()
        ticks = run(clock, [4, 3, 3, 2], ((prompt,), (prompt + 1,)), xs)
        assert steps(ticks) == [[s, s] for s in range(4)]
        x = torch.zeros(3)
        clock = Clock()
        clock.tick(4, x), clock.tick(3, x)
        x.add_(1)  # not counted: only the content tells that this is another stage
        assert clock.tick(3, x).step == 2


def test_a_hook_counts_and_nothing_is_read():
    clock = Clock()
    clock.begin(5, [5, 4, 3, 2, 1])
    assert clock.steps == 5
    ticks = run(clock, [5, 4, 3], (COND, UNCOND), after=clock.advance)
    assert steps(ticks) == [[0, 0], [1, 1], [2, 2]]
    assert not clock.needs_time
    assert clock.tick(None, latents(1)[0], COND).step == 3
    assert clock.reads == 0


def test_hooks_and_guesses_agree():
    times = [5, 4, 4, 3, 3]  # Heun
    hooked, bare = Clock(), Clock()
    hooked.begin(3, times)
    assert hooked.steps == 5
    assert steps(run(hooked, times, (COND, UNCOND), after=hooked.advance)) == steps(run(bare, times, (COND, UNCOND)))


def test_windows_under_a_hook_are_branches():
    clock, xs = Clock(), latents(6)
    clock.begin(2, [2, 1])
    first = [clock.tick(2, x, COND) for x in xs[:3]]
    clock.advance(0)
    second = [clock.tick(1, x, COND) for x in xs[3:]]
    assert [t.step for t in first + second] == [0, 0, 0, 1, 1, 1]
    assert len({t.branch for t in first}) == 3
    assert [t.branch for t in first] == [t.branch for t in second]


def test_image_to_image_begins_in_the_middle_of_the_schedule():
    clock = Clock()
    clock.begin(10, list(range(10, 0, -1)))
    ticks = run(clock, [4, 3, 2, 1], after=lambda i: clock.advance(i + 6))
    assert steps(ticks) == [[0], [1], [2], [3]]
    assert clock.steps == 4


def test_a_hook_without_steps_falls_back_on_the_time():
    clock = Clock()
    clock.begin(3, [3, 2, 1])
    ticks = run(clock, [3, 2, 1])  # this loop never calls scheduler.step
    assert steps(ticks) == [[0], [1], [2]]
    assert requests(ticks) == [1]


def test_a_call_after_the_schedulers_last_step():
    clock = Clock()
    clock.begin(2, [2, 1])
    run(clock, [2, 1], after=clock.advance)
    tick = clock.tick(2, latents(1)[0], COND)
    assert (tick.request, tick.step) == (2, 0)
    assert "last step" in tick.opened


def test_a_request_opened_by_the_caller_ignores_breaks():
    clock = Clock()
    clock.begin(4, kind="caller")
    ticks = run(clock, [4, 2, 3, 1])
    assert steps(ticks) == [[0], [1], [2], [3]]
    assert requests(ticks) == [1]
    clock.close()
    assert clock.tick(4, latents(1)[0], COND).request == 2


def test_advance_by_the_caller():
    clock, xs = Clock(), latents(3)
    clock.begin(4, kind="caller")
    for step, x in enumerate(xs):
        assert clock.tick(1, x).step == step  # a constant time, even
        clock.advance()


def test_advance_without_a_request_says_nothing():
    clock = Clock()
    clock.advance(7)
    assert steps(run(clock, [3, 2], after=clock.advance)) == [[0], [1]]


@pytest.mark.parametrize("time", [math.nan, math.inf])
def test_a_time_that_is_not_finite(time):
    with pytest.raises(SessionError, match="timestep is"):
        Clock().tick(time, None)


def test_a_model_without_a_timestep():
    clock, xs = Clock(), latents(3)
    opened = [clock.tick(None, x).opened for x in xs]
    assert "no timestep" in opened[1]
    clock.begin(3, kind="caller")
    assert [clock.tick(None, x).step for x in xs] == [0, 1, 2]


def test_rollback():
    clock, xs = Clock(), latents(3)
    clock.tick(3, xs[0], COND)
    lost = clock.tick(3, xs[0], UNCOND)
    clock.rollback()
    again = clock.tick(3, xs[0], UNCOND)
    assert (lost.step, lost.request) == (again.step, again.request) == (0, 1)
    assert clock.tick(2, xs[1], UNCOND).step == 1
    clock.rollback()
    assert clock.tick(2, xs[1], UNCOND).step == 1
    assert clock.tick(2, xs[1], COND).step == 1
    clock.tick(9, xs[2], COND)  # opens a request, and fails
    clock.rollback()
    tick = clock.tick(9, xs[2], COND)
    assert tick.step == 0
    assert "failed" in tick.opened
