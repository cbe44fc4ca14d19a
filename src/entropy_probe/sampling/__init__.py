"""Prompts, rewards, advantages, generation, and files of rollouts."""

from entropy_probe.rollouts.parquet import read_rollouts, unused_columns, write_rollouts
from entropy_probe.sampling.advantages import ScaleRewards, group_advantages
from entropy_probe.sampling.collect import SamplingReport, UpdateSettings, sample_update
from entropy_probe.sampling.divided import share_engine
from entropy_probe.sampling.engine import ENGINES, Completion, Engine, GenerationSettings, Progress, SamplingParameters
from entropy_probe.sampling.evaluation import (
    EvaluationSettings,
    resample_responses,
    sample_evaluation,
    sample_evaluation_file,
    sample_pilot,
)
from entropy_probe.sampling.hf import HFGenerator
from entropy_probe.sampling.prompts import Message, Prompt, PromptSource, load_prompts
from entropy_probe.sampling.responses import generate_responses
from entropy_probe.sampling.rewards import Reward, Rewards, load_reward, load_rewards, score_responses
from entropy_probe.sampling.server import ServerEngine
from entropy_probe.sampling.templates import encode_prompts, last_user_message, prompt_notes

__all__ = [
    "ENGINES",
    "Completion",
    "Engine",
    "EvaluationSettings",
    "GenerationSettings",
    "HFGenerator",
    "Message",
    "Progress",
    "Prompt",
    "PromptSource",
    "Reward",
    "Rewards",
    "SamplingParameters",
    "SamplingReport",
    "ScaleRewards",
    "ServerEngine",
    "UpdateSettings",
    "encode_prompts",
    "generate_responses",
    "group_advantages",
    "last_user_message",
    "load_prompts",
    "load_reward",
    "load_rewards",
    "prompt_notes",
    "read_rollouts",
    "resample_responses",
    "sample_evaluation",
    "sample_evaluation_file",
    "sample_pilot",
    "sample_update",
    "score_responses",
    "share_engine",
    "unused_columns",
    "write_rollouts",
]
