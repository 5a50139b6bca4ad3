"""The schedule's tables against diffusers' schedulers and closed forms; what is converted, and what is refused.

The cases here serve test_mdp.py and test_losses.py too.
"""

import math
from inspect import signature
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
    SCMScheduler,
    TCDScheduler,
)

from pso_utils.errors import UserError
from pso_utils.schedules import SCHEDULERS, TABLES, Schedule, convert_scheduler, make_schedule


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# SDXL-base's scheduler/scheduler_config.json
SDXL_BASE = {
    **BETAS,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
TRAILING = {"timestep_spacing": "trailing"}
ALL_TIMESTEPS = {"original_inference_steps": 1000}
CLIPPED = {"clip_sample": True, "clip_sample_range": 0.5}
UNCLIPPED = {"clip_sample": False}
ZERO_SNR = {"rescale_betas_zero_snr": True}
V_PREDICTION, SAMPLE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
CUSTOM = {"timesteps": [999, 820, 410, 30]}
DYNAMIC = {"use_dynamic_shifting": True}


class Case(NamedTuple):
    """A scheduler's config, and the arguments of `make_schedule`: 4 steps unless they say otherwise."""

    scheduler_class: type[SchedulerMixin]
    config: dict = {}
    arguments: dict = {}

    def __str__(self) -> str:
        values = [f"{key}={value}" for key, value in {**self.config, **self.arguments}.items()]
        return ",".join([self.scheduler_class.__name__, *values])

    @property
    def steps(self) -> dict:
        """The arguments of `set_timesteps`."""
        steps = {key: value for key, value in self.arguments.items() if key not in ("eta", "stochastic")}
        return steps if "timesteps" in steps else {"num_inference_steps": 4, **steps}

    def scheduler(self) -> SchedulerMixin:
        betas = BETAS if "beta_start" in signature(self.scheduler_class).parameters else {}
        return self.scheduler_class(**{**betas, **self.config})

    def schedule(self) -> Schedule:
        return make_schedule(self.scheduler(), **{**self.arguments, **self.steps})

    def stepper(self, dtype: torch.dtype = torch.float32) -> SchedulerMixin:
        """The diffusers scheduler whose `step` this case is, its timesteps set, its noise levels in `dtype`."""
        scheduler = self.scheduler()
        if self.scheduler_class is EulerDiscreteScheduler:
            scheduler = EulerAncestralDiscreteScheduler.from_config(scheduler.config)
        if self.scheduler_class is FlowMatchEulerDiscreteScheduler and self.arguments.get("eta") == 1:
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, stochastic_sampling=True)
        scheduler.set_timesteps(**self.steps)
        for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name).to(dtype))
        return scheduler


def sigmas(num_steps: int) -> list[float]:
    """What flow matching's pipelines pass."""
    return np.linspace(1, 1 / num_steps, num_steps).tolist()


# The five schedulers of diffusion models, with every prediction type.
MATRIX = [
    Case(scheduler_class, {**config, "prediction_type": prediction_type})
    for scheduler_class, config in [
        (LCMScheduler, ALL_TIMESTEPS),
        (EulerAncestralDiscreteScheduler, TRAILING),
        (TCDScheduler, ALL_TIMESTEPS),
        (DDIMScheduler, {**TRAILING, **UNCLIPPED}),
        (EulerDiscreteScheduler, TRAILING),
    ]
    for prediction_type in ("epsilon", "v_prediction", "sample")
    if (scheduler_class, prediction_type) != (EulerAncestralDiscreteScheduler, "sample")
]
VARIANTS = [
    Case(LCMScheduler),
    Case(LCMScheduler, {}, CUSTOM),
    Case(LCMScheduler, {**CLIPPED, **ALL_TIMESTEPS}, {"num_inference_steps": 3}),
    Case(LCMScheduler, {**V_PREDICTION, "timestep_scaling": 0.003, **CLIPPED}, {"num_inference_steps": 5}),
    Case(LCMScheduler, {**V_PREDICTION, **ZERO_SNR}, {"timesteps": [999, 500, 0]}),
    Case(EulerAncestralDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    Case(EulerAncestralDiscreteScheduler, {**V_PREDICTION, "timestep_spacing": "linspace"}, {"num_inference_steps": 7}),
    Case(EulerAncestralDiscreteScheduler, {**V_PREDICTION, **ZERO_SNR, **TRAILING}),
    Case(EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    Case(TCDScheduler, {}, {"num_inference_steps": 5, "eta": 1.0}),
    Case(TCDScheduler, {**SAMPLE, **CLIPPED}, {"num_inference_steps": 3, "eta": 0.7}),
    Case(TCDScheduler, {}, {**CUSTOM, "eta": 0.05}),
    Case(TCDScheduler, {**V_PREDICTION, **ZERO_SNR}),
    Case(DDIMScheduler, {**CLIPPED, **TRAILING}, {"num_inference_steps": 6}),
    Case(DDIMScheduler, {**SAMPLE, **CLIPPED, "set_alpha_to_one": False, "steps_offset": 1}, {"eta": 0.5}),
    Case(DDIMScheduler, {**V_PREDICTION, **ZERO_SNR, **UNCLIPPED, **TRAILING}),
    Case(DDIMScheduler, {"timestep_spacing": "linspace", **UNCLIPPED}, {"num_inference_steps": 7}),
]
DEPLOYED = [
    Case(LCMScheduler, ALL_TIMESTEPS, {"num_inference_steps": 1, "stochastic": False}),
    Case(EulerAncestralDiscreteScheduler, TRAILING, {"num_inference_steps": 1, "stochastic": False}),
    Case(TCDScheduler, {}, {"eta": 0.0, "stochastic": False}),
    Case(DDIMScheduler, {**TRAILING, **UNCLIPPED}, {"eta": 0.0, "stochastic": False}),
    Case(DDIMScheduler, {**SAMPLE, **TRAILING}, {"num_inference_steps": 1, "stochastic": False}),
]
# Euler's transition is in diffusers only where its ancestral counterpart takes the prediction type; the rest is tested
# against the closed form.
IN_DIFFUSERS = [case for case in MATRIX if case[:2] != (EulerDiscreteScheduler, {**TRAILING, **SAMPLE})]
DIFFUSION = IN_DIFFUSERS + VARIANTS + DEPLOYED

FLOW_STEPS = [
    ({}, {}),
    ({"shift": 3.0}, {}),
    ({"shift": 3.0}, {"sigmas": sigmas(4)}),
    ({"shift_terminal": 0.1}, {"sigmas": sigmas(4)}),
    (DYNAMIC, {"sigmas": sigmas(4), "mu": 1.15}),
    ({**DYNAMIC, "time_shift_type": "linear"}, {"sigmas": sigmas(4), "mu": 2.3}),
    ({"shift": 3.0}, {"num_inference_steps": 1, "sigmas": sigmas(1)}),
    ({"shift": 3.0}, {"num_inference_steps": 2, "sigmas": sigmas(2)}),
    (DYNAMIC, {"num_inference_steps": 8, "sigmas": sigmas(8), "mu": 0.63}),
]
FLOW_DEPLOYED, FLOW_RENOISED, FLOW_HALF, FLOW_LCM = (
    [Case(scheduler_class, config, {**steps, "stochastic": False, **eta}) for config, steps in FLOW_STEPS]
    for scheduler_class, eta in [
        (FlowMatchEulerDiscreteScheduler, {"eta": 0.0}),
        (FlowMatchEulerDiscreteScheduler, {"eta": 1.0}),
        (FlowMatchEulerDiscreteScheduler, {"eta": 0.5}),
        (FlowMatchLCMScheduler, {}),
    ]
)
FLOW = FLOW_DEPLOYED + FLOW_RENOISED + FLOW_HALF + FLOW_LCM
SCM = [
    Case(SCMScheduler, {}, {"num_inference_steps": 2}),
    Case(SCMScheduler, {"sigma_data": 0.7}, {"intermediate_timesteps": None}),
    Case(SCMScheduler, {}, {"num_inference_steps": 1, "intermediate_timesteps": None, "stochastic": False}),
]
# One model's prediction with every number of steps and eta: what offline training takes.
OFFLINE = [
    Case(case.scheduler_class, case.config, {"num_inference_steps": num_steps, "stochastic": False, **eta})
    for case in MATRIX
    if case.config["prediction_type"] == "epsilon"
    for num_steps in (1, 2, 4, 8)
    for eta in ([{"eta": 0.0}, {"eta": 0.4}, {"eta": 1.0}] if TABLES[case.scheduler_class].default_eta else [{}])
]
EVERY = MATRIX + VARIANTS + OFFLINE + FLOW + SCM
# FlowMatchEuler, which has two forms, twice.
ONE_A_CLASS = [*MATRIX[::3], FLOW_DEPLOYED[0], FLOW_RENOISED[0], FLOW_LCM[0], SCM[0]]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def relative_error(computed: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((computed - expected).abs().max() / expected.abs().max()).detach())


# ---- The tables ----


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_noise_of_the_next_level_is_what_is_kept_and_what_is_added(case):
    columns = case.schedule().columns
    assert torch.allclose(columns.eps_gain**2 + columns.std**2, columns.next_sigma**2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_step_but_the_last_leads_to_the_next_ones_level(case):
    """DDIM's by its own rule, t - 1000 // N, where the timesteps are that far apart."""
    schedule = case.schedule()
    columns, gaps = schedule.columns, set((schedule.timesteps[:-1] - schedule.timesteps[1:]).tolist())
    if case.scheduler_class is DDIMScheduler and gaps != {1000 // schedule.num_steps}:
        return
    assert torch.allclose(columns.next_alpha[:-1], columns.alpha[1:], rtol=1e-6, atol=1e-7)
    assert torch.allclose(columns.next_sigma[:-1], columns.sigma[1:], rtol=1e-6, atol=1e-7)


def test_ddims_next_level_is_not_always_the_next_timesteps():
    schedule = Case(DDIMScheduler, {**TRAILING, **UNCLIPPED}, {"num_inference_steps": 6}).schedule()
    assert schedule.timesteps.tolist() == [999, 832, 666, 499, 332, 166]
    previous = schedule.timesteps - 166
    assert torch.allclose(schedule.columns.next_alpha[:5], schedule.train_alpha[previous[:5]])
    assert not torch.allclose(schedule.columns.next_alpha[:5], schedule.columns.alpha[1:], rtol=1e-4)


@pytest.mark.parametrize("case", ONE_A_CLASS, ids=str)
def test_last_step_leads_to_clean_latents_without_noise(case):
    """TCD's to timestep 0, whose level is not quite clean."""
    columns = case.schedule().columns
    not_clean = BETAS["beta_start"] if case.scheduler_class is TCDScheduler else 0.0
    assert columns.next_alpha[-1].item() == pytest.approx(math.sqrt(1 - not_clean))
    assert columns.next_sigma[-1].item() == pytest.approx(math.sqrt(not_clean), rel=1e-4)
    assert columns.std[-1] == 0


def test_ddim_without_alpha_one_has_a_tiny_last_std():
    schedule = Case(DDIMScheduler, {**TRAILING, "set_alpha_to_one": False}).schedule()
    assert 0 < schedule.columns.std[-1] < 0.03


@pytest.mark.parametrize("case", FLOW, ids=str)
def test_flow_levels_are_the_shifted_sigmas(case):
    """k s / (1 + (k - 1) s), where k is shift, exp(mu) or mu; shift_terminal stretches them."""
    schedule, given = case.schedule(), case.arguments.get("sigmas")
    if given is None:
        given = torch.linspace(1, case.stepper().sigma_min, schedule.num_steps)
    given, k = torch.tensor([*given], dtype=torch.float64), case.config.get("shift", 1.0)
    if "mu" in case.arguments:
        mu = case.arguments["mu"]
        k = mu if case.config.get("time_shift_type") == "linear" else math.exp(mu)
    sigma = k * given / (1 + (k - 1) * given)
    if "shift_terminal" in case.config:
        sigma = 1 - (1 - sigma) * (1 - case.config["shift_terminal"]) / (1 - sigma[-1])
    assert torch.allclose(schedule.columns.sigma.double(), sigma, rtol=1e-6)
    assert torch.allclose(schedule.columns.alpha.double(), 1 - sigma, atol=1e-6)
    assert torch.allclose(schedule.timesteps.double(), 1000 * sigma, rtol=1e-6)


@pytest.mark.parametrize("shift", (0.54, 1.15, 3.0, 7.7))
def test_a_shift_that_rounds_the_first_sigma_above_one_is_accepted(shift):
    schedule = make_schedule(FlowMatchEulerDiscreteScheduler(shift=shift), 4)
    assert schedule.columns.sigma[0].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_starting_latents_have_the_first_levels_deviation(case):
    """SCM's is sigma_data, although its `init_noise_sigma` says 1."""
    schedule = case.schedule()
    if case.scheduler_class is SCMScheduler:
        assert schedule.init_noise_sigma == schedule.sigma_data == case.scheduler().config.sigma_data
    else:
        assert schedule.init_noise_sigma == float(getattr(case.stepper(), "init_noise_sigma", 1.0))


@pytest.mark.parametrize("case", ONE_A_CLASS, ids=str)
def test_columns_are_float32_and_each_samples_own(case):
    schedule = case.schedule()
    assert schedule.table.dtype == torch.float32
    step_index = torch.tensor([1, 0, 1])
    steps = schedule.at(step_index)
    assert torch.equal(steps.timesteps, schedule.timesteps[step_index])
    for of_all_steps, of_the_samples in zip(schedule.columns, steps.columns, strict=True):
        assert of_all_steps.shape == (schedule.num_steps,) and of_the_samples.shape == (3, 1, 1, 1)
        assert torch.equal(of_all_steps[step_index], of_the_samples.flatten())


@pytest.mark.parametrize("case", [*MATRIX, *FLOW_RENOISED[:1], *SCM[:1]], ids=str)
def test_a_scheduler_that_a_pipeline_has_run_gives_the_same_schedule_and_is_not_changed(case):
    expected, scheduler = case.schedule(), case.scheduler()
    scheduler.set_timesteps(3, **({"intermediate_timesteps": None} if case in SCM else {}))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(1)
    scheduler.step(randn(1), scheduler.timesteps[1], randn(1))
    state = dict(vars(scheduler))
    schedule = make_schedule(scheduler, **{**case.arguments, **case.steps})
    assert torch.equal(schedule.table, expected.table) and torch.equal(schedule.timesteps, expected.timesteps)
    assert vars(scheduler).keys() == state.keys()
    assert all(vars(scheduler)[key] is value for key, value in state.items())


def test_settings_of_another_class_do_not_count():
    """A config keeps the entries of the class that it was converted from; LCM has no Karras sigmas."""
    karras = EulerDiscreteScheduler(**{**SDXL_BASE, "use_karras_sigmas": True})
    assert make_schedule(LCMScheduler.from_config(karras.config), 4).num_steps == 4
    assert make_schedule(convert_scheduler(karras, "lcm"), 4).num_steps == 4
    with pytest.raises(UserError, match="use_karras_sigmas"):
        make_schedule(convert_scheduler(karras, "euler"), 4)


@pytest.mark.parametrize(
    "scheduler, stochastic, eta",
    [
        (LCMScheduler(), True, None),
        (EulerDiscreteScheduler(), True, None),
        (EulerAncestralDiscreteScheduler(), True, None),
        (TCDScheduler(), True, 0.3),
        (TCDScheduler(), False, 0.3),
        (DDIMScheduler(), True, 1.0),
        (FlowMatchLCMScheduler(), True, None),
        (FlowMatchEulerDiscreteScheduler(), True, 1.0),
        (FlowMatchEulerDiscreteScheduler(), False, 0.0),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), False, 1.0),
    ],
)
def test_default_eta(scheduler, stochastic, eta):
    assert make_schedule(scheduler, 4, stochastic=stochastic).eta == eta


# ---- Conversion ----

TRAILING_STEPS = {
    1: [999],
    2: [999, 499],
    4: [999, 749, 499, 249],
    5: [999, 799, 599, 399, 199],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
}
SOURCES = {
    "sdxl_lcm": lambda: LCMScheduler(**BETAS, original_inference_steps=50),
    "sdxl_base": lambda: EulerDiscreteScheduler(**SDXL_BASE),
    "sdxl_turbo": lambda: EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "tcd": lambda: TCDScheduler(**BETAS),
    "ddim": lambda: DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False),
    "v_prediction": lambda: DDIMScheduler(**BETAS, prediction_type="v_prediction"),
    "dpm": lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=False, timestep_spacing="linspace"),
    "all_defaults": lambda: LCMScheduler(),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_conversions_run_the_distilled_timesteps(name, source):
    scheduler = SOURCES[source]()
    converted = convert_scheduler(scheduler, name)
    assert type(converted) is SCHEDULERS[name]
    assert torch.equal(converted.alphas_cumprod, scheduler.alphas_cumprod)
    assert converted.config.prediction_type == scheduler.config.prediction_type
    assert not converted.config.get("clip_sample")
    for num_steps, expected in TRAILING_STEPS.items():
        schedule = make_schedule(converted, num_steps, stochastic=False)
        assert schedule.timesteps.tolist() == expected
        assert torch.allclose(schedule.train_alpha**2, scheduler.alphas_cumprod)


def test_conversion_survives_a_round_trip_through_the_disk(tmp_path):
    converted = convert_scheduler(LCMScheduler(), "euler")
    converted.save_pretrained(tmp_path)
    loaded = EulerDiscreteScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.alphas_cumprod, converted.alphas_cumprod)
    assert make_schedule(loaded, 4).timesteps.tolist() == TRAILING_STEPS[4]


@pytest.mark.parametrize(
    "scheduler, timesteps",
    [
        (EulerDiscreteScheduler(**SDXL_BASE), [751, 501, 251, 1]),
        (LCMScheduler(**BETAS), [999, 759, 499, 259]),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), None),
    ],
)
def test_without_a_name_the_schedule_stays_the_pipelines_own(scheduler, timesteps):
    kept = convert_scheduler(scheduler)
    assert type(kept) is type(scheduler) and kept is not scheduler
    assert torch.equal(make_schedule(kept, 4).table, make_schedule(scheduler, 4).table)
    assert timesteps is None or make_schedule(kept, 4).timesteps.tolist() == timesteps


@pytest.mark.parametrize(
    "spacing, expected",
    [("trailing", [999, 749, 499, 249]), ("leading", [751, 501, 251, 1]), ("linspace", [999, 666, 333, 0])],
)
@pytest.mark.parametrize("name", (None, "euler", "euler_ancestral", "ddim"))
def test_timestep_spacing_overrides(name, spacing, expected):
    converted = convert_scheduler(EulerDiscreteScheduler(**SDXL_BASE), name, timestep_spacing=spacing)
    assert make_schedule(converted, 4).timesteps.tolist() == expected


@pytest.mark.parametrize("name", (None, "lcm", "tcd"))
def test_original_inference_steps_is_the_grid_that_the_model_was_distilled_on(name):
    converted = convert_scheduler(LCMScheduler(original_inference_steps=25), name, original_inference_steps=50)
    assert make_schedule(converted, 4).timesteps.tolist() == [999, 759, 499, 259]
    with pytest.raises(UserError, match="1 to 50 steps, not 60.*or raise --original_inference_steps"):
        make_schedule(converted, 60)


@pytest.mark.parametrize(
    "scheduler, name, options, message",
    [
        (LCMScheduler(), "dpm", {}, "unknown scheduler 'dpm': pass one of lcm, euler_ancestral, euler, tcd, ddim"),
        (DDIMScheduler(), None, {"timestep_spacing": "karras"}, "unknown timestep_spacing 'karras': pass trailing, "),
        (DDIMScheduler(), "lcm", {"timestep_spacing": "trailing"}, "on LCMScheduler.*drop it, or pass timesteps"),
        (TCDScheduler(), None, {"timestep_spacing": "trailing"}, "on TCDScheduler.*drop it, or pass timesteps"),
        (SCMScheduler(), None, {"timestep_spacing": "trailing"}, "no effect on SCMScheduler"),
        (LCMScheduler(), "ddim", {"original_inference_steps": 50}, "no effect on DDIMScheduler: drop it, or convert"),
        (LCMScheduler(), None, {"original_inference_steps": 0}, "0 is out of range: pass 1 to 1000"),
        (DDIMScheduler(), "tcd", {"original_inference_steps": 1001}, "1001 is out of range: pass 1 to 1000"),
        (FlowMatchEulerDiscreteScheduler(), "lcm", {}, "no alphas_cumprod to convert.*not by flow matching: drop it"),
        (FlowMatchLCMScheduler(), "euler", {}, "no alphas_cumprod to convert"),
        (SCMScheduler(), "lcm", {}, "no alphas_cumprod to convert"),
    ],
)
def test_what_cannot_be_converted_is_a_clear_error(scheduler, name, options, message):
    with pytest.raises(UserError, match=message) as error:
        convert_scheduler(scheduler, name, **options)
    assert "\n" not in str(error.value)


# ---- The support matrix ----

LCM, TCD, DDIM = LCMScheduler, TCDScheduler, DDIMScheduler
EULER, ANCESTRAL = EulerDiscreteScheduler, EulerAncestralDiscreteScheduler
FLOW_EULER, RENOISE, TRIG = FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, SCMScheduler
ONE_STEP = {"num_inference_steps": 1}


@pytest.mark.parametrize(
    "case, message",
    [
        (Case(DPMSolverMultistepScheduler), "convert it to one of lcm, euler_ancestral, euler, tcd, ddim"),
        (
            Case(EULER, {"use_karras_sigmas": True}),
            r"set use_karras_sigmas to False.*or convert to lcm, euler_ancestral, tcd, ddim \(--scheduler\)",
        ),
        (Case(EULER, {"use_exponential_sigmas": True}), "set use_exponential_sigmas to False"),
        (Case(EULER, {"interpolation_type": "log_linear"}), "set interpolation_type to 'linear'"),
        (Case(EULER, {"timestep_type": "continuous"}), "set timestep_type to 'discrete'"),
        (Case(DDIM, {"thresholding": True}), "set thresholding to False"),
        (Case(LCM, {"thresholding": True}), "set thresholding to False"),
        (Case(FLOW_EULER, {"use_karras_sigmas": True}), "set use_karras_sigmas to False .*scheduler_config.json$"),
        (Case(RENOISE, {"use_exponential_sigmas": True}), "set use_exponential_sigmas to False"),
        (Case(FLOW_EULER, {"invert_sigmas": True}), "set invert_sigmas to False"),
        (Case(RENOISE, {"scale_factors": [0.5, 1.0]}), "set scale_factors to None"),
        (
            Case(ANCESTRAL, SAMPLE),
            "'sample': use a model that predicts epsilon or v_prediction, or convert to lcm, euler, tcd, ddim",
        ),
        (
            Case(DDIM, {"prediction_type": "flow_prediction"}),
            "no prediction_type 'flow_prediction': use a model that predicts epsilon or v_prediction or sample$",
        ),
        (
            Case(TRIG, {"prediction_type": "epsilon"}),
            "no prediction_type 'epsilon': use a model that predicts trigflow$",
        ),
        (Case(LCM, {}, {"num_inference_steps": None}), "pass either num_inference_steps or timesteps"),
        (Case(LCM, {}, {"num_inference_steps": 4, **CUSTOM}), "pass either num_inference_steps or timesteps"),
        (Case(LCM, {}, {"num_inference_steps": 51}), "1 to 50 steps, not 51.*or raise --original_inference_steps"),
        (Case(EULER, {}, {"num_inference_steps": 0}), "1 to 1000 steps, not 0: pass one of these$"),
        (Case(DDIM, {}, {"num_inference_steps": 1001}), "1 to 1000 steps, not 1001"),
        (Case(DDIM, {"steps_offset": 1}, {"num_inference_steps": 1000}), "no usable timesteps for 1000 steps"),
        (Case(DDIM, TRAILING, {"num_inference_steps": 61}), "no usable timesteps for 61 steps"),
        (Case(DDIM, {}, CUSTOM), "takes no timesteps: pass num_inference_steps, or convert to lcm, euler, tcd"),
        (Case(ANCESTRAL, {}, CUSTOM), "takes no timesteps: pass num_inference_steps"),
        (Case(FLOW_EULER, {}, CUSTOM), "takes no timesteps: pass num_inference_steps$"),
        (Case(RENOISE, {}, CUSTOM), "takes no timesteps: pass num_inference_steps$"),
        (Case(TRIG, {}, CUSTOM), "takes no timesteps: pass num_inference_steps$"),
        (Case(LCM, {}, {"timesteps": [499, 999]}), "must descend within 999 to 0: pass e.g. 999 749 499 249"),
        (Case(EULER, {}, {"timesteps": [999, 499, 499]}), "must descend within 999 to 0"),
        (Case(TCD, {}, {"timesteps": [1000, 499]}), "must descend within 999 to 0"),
        (Case(EULER, {}, {"timesteps": [999, -1]}), "must descend within 999 to 0"),
        (Case(LCM, {}, {"timesteps": []}), "must descend within 999 to 0"),
        (Case(LCM, {}, ONE_STEP), "one-step schedule.*pass at least 2 steps"),
        (Case(EULER, {}, {"timesteps": [999]}), "one-step schedule.*pass at least 2 steps"),
        (Case(FLOW_EULER, {}, ONE_STEP), "one-step schedule.*pass at least 2 steps"),
        (Case(TRIG, {}, {**ONE_STEP, "intermediate_timesteps": None}), "one-step schedule.*pass at least 2 steps"),
        (
            Case(LCM, {}, {"eta": 0.5}),
            "takes no eta: drop it .only TCD.*, DDIM.*, FlowMatchEulerDiscreteScheduler take",
        ),
        (Case(EULER, {}, {"eta": 0.0}), "takes no eta: drop it"),
        (Case(RENOISE, {}, {"eta": 1.0}), "takes no eta: drop it"),
        (Case(TRIG, {}, {"num_inference_steps": 2, "eta": 1.0}), "takes no eta: drop it"),
        (Case(DDIM, {}, {"eta": 0.0}), r"no density to train on: pass an eta in \(0, 1\], by default 1.0"),
        (Case(TCD, {}, {"eta": 0.0}), r"no density to train on: pass an eta in \(0, 1\], by default 0.3"),
        (Case(FLOW_EULER, {}, {"eta": 0.0}), r"no density to train on: pass an eta in \(0, 1\], by default 1.0"),
        (Case(TCD, {}, {"eta": 1.1}), r"out of range: pass an eta in \(0, 1\]"),
        (Case(DDIM, {}, {"eta": -0.1}), r"out of range: pass an eta in \(0, 1\]"),
        (Case(FLOW_EULER, {}, {"eta": float("nan")}), r"out of range: pass an eta in \(0, 1\]"),
        (Case(TCD, {}, {"timesteps": [999, 499, 0]}), "no noise after timestep 499.*end above 0, or a larger eta"),
        (Case(LCM, {**ALL_TIMESTEPS, **ZERO_SNR}), "not finite at timestep 999.*v_prediction"),
        (Case(DDIM, {**TRAILING, **ZERO_SNR}), "not finite at timestep 999.*v_prediction"),
    ],
    ids=str,
)
def test_what_has_no_transition_is_a_clear_error(case, message):
    with pytest.raises(UserError, match=message) as error:
        case.schedule()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scheduler_class", (FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler))
def test_beta_sigmas_are_refused(scheduler_class):
    pytest.importorskip("scipy")
    with pytest.raises(UserError, match="set use_beta_sigmas to False"):
        make_schedule(scheduler_class(use_beta_sigmas=True), 4)
