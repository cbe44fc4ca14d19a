"""Prompts, rewards, advantages, generation, and files of rollouts."""

from entropy_probe.sampling.advantages import ScaleRewards, group_advantages
from entropy_probe.sampling.collect import (
    EvaluationSettings,
    GenerationSettings,
    SamplingReport,
    UpdateSettings,
    resample_responses,
    sample_evaluation,
    sample_update,
)
from entropy_probe.sampling.files import read_rollouts, write_rollouts
from entropy_probe.sampling.hf import Completion, Progress, encode_prompts, generate_completions, generate_from_tokens
from entropy_probe.sampling.prompts import Message, Prompt, PromptSource, load_prompts
from entropy_probe.sampling.rewards import Reward, load_reward, score_responses

__all__ = [
    "Completion",
    "EvaluationSettings",
    "GenerationSettings",
    "Message",
    "Progress",
    "Prompt",
    "PromptSource",
    "Reward",
    "SamplingReport",
    "ScaleRewards",
    "UpdateSettings",
    "encode_prompts",
    "generate_completions",
    "generate_from_tokens",
    "group_advantages",
    "load_prompts",
    "load_reward",
    "read_rollouts",
    "resample_responses",
    "sample_evaluation",
    "sample_update",
    "score_responses",
    "write_rollouts",
]
