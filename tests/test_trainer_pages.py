"""What the trainers' pages say to type: every command is run where their files lie, and every config is read."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from entropy_probe import Rollouts
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.cli.config import load_config
from tests.checkpoints.ranks.make import LORA
from tests.cli.conftest import invoke

ROOT = Path(__file__).parents[1]
PAGES = sorted(page.stem for page in (ROOT / "docs" / "trainers").glob("*.md"))
ARCHIVES = ROOT / "tests" / "checkpoints" / "ranks"
BASE = "Qwen/Qwen2.5-1.5B"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / "trainers" / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> Iterator[list[str]]:
    for line in "".join(blocks(page, "sh")).splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "entropy-probe", line
        yield arguments


@pytest.fixture
def unpack(tmp_path, monkeypatch) -> Callable[..., None]:
    """In an empty directory, put what lies in an archive where a page has it, and its base model."""
    monkeypatch.chdir(tmp_path)

    def unpack(case: str, **places: str) -> None:
        with tarfile.open(ARCHIVES / f"{case}.tar.xz") as archive:
            archive.extractall("unpacked", filter="data")
        for inside, place in {"base": BASE, **places}.items():
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(f"unpacked/{inside}".rstrip("."), place)

    return unpack


def of_the_trainer(source: Path, place: str) -> None:
    Path(place).parent.mkdir(parents=True)
    shutil.copytree(source, place)


def as_dcp(run, place: str) -> None:
    """The state of a run under prime-rl's keys."""
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state = run.load(2)
    weights, moments = get_model_state_dict(state.model), get_optimizer_state_dict(state.model, state.optimizer)
    save({"app": {"model": weights, "optimizers": moments}}, checkpoint_id=place, no_dist=True)
    shutil.copytree(run.directory / "base", BASE)


@pytest.fixture
def lay_out(unpack, trained, runs) -> Callable[[str], None]:
    """Put the files of a page's trainer into the current directory."""

    def areal() -> None:
        name, recovered = "checkpoints/epoch0epochstep40globalstep40", "recover/globalstep40"
        unpack("fsdp2-full", **{"global_step_2/actor": name})
        state = load_checkpoint(Path(name))
        for file in (*Path(name).glob("model_world_size*"), Path(name, "fsdp_config.json")):
            file.unlink()
        state.model.save_pretrained(name)
        shutil.rmtree(BASE)
        as_dcp(runs("full"), recovered)

    def openrlhf(case: str = "zero2-full") -> None:
        unpack(case, **{".": "ckpt/_actor"})
        Path("ckpt/_actor/global_step2").rename("ckpt/_actor/global_step40")
        Path("ckpt/_actor/latest").write_text("global_step40")

    def deepspeed() -> None:
        unpack("zero2-full", **{".": "runs/grpo/checkpoint-40"})
        shutil.copy(f"{BASE}/config.json", "runs/grpo/checkpoint-40")
        Path("runs/grpo/checkpoint-40/trainer_state.json").write_text(json.dumps({"global_step": 3}))

    def ms_swift() -> None:
        """Whose arguments are of classes of its own."""
        of_the_trainer(trained.checkpoint, "output/v0-20260101-000000/checkpoint-40")
        Path("output/v0-20260101-000000/checkpoint-40/training_args.bin").unlink()

    def unsloth() -> None:
        of_the_trainer(ROOT / "tests" / "fixtures" / "trl_8bit" / "checkpoint-2", "outputs/checkpoint-40")
        shutil.copytree(trained.directory / "base", "unsloth/Qwen2.5-1.5B")
        config = Path("outputs/checkpoint-40/adapter_config.json")
        config.write_text(config.read_text().replace("elsewhere/base", "unsloth/Qwen2.5-1.5B"))

    layouts = {
        "trl": lambda: of_the_trainer(trained.checkpoint, "runs/grpo/checkpoint-40"),
        "ms-swift": ms_swift,
        "axolotl": lambda: of_the_trainer(trained.checkpoint, "outputs/out/checkpoint-40"),
        "verl": lambda: unpack("fsdp1-full", **{"global_step_2/actor": "checkpoints/global_step_40/actor"}),
        "skyrl": lambda: unpack("fsdp2-full", **{"global_step_2/actor": "ckpts/global_step_40/policy"}),
        "prime-rl": lambda: as_dcp(runs("full"), "outputs/checkpoints/step_40/trainer"),
        "areal": areal,
        "openrlhf": openrlhf,
        "openrlhf LoRA": lambda: openrlhf("zero2-lora"),
        "deepspeed": deepspeed,
        "unsloth": unsloth,
    }
    assert {name.split()[0] for name in layouts} == set(PAGES)
    return lambda page: layouts[page]()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_to_type(lay_out, page):
    lay_out(page)
    said = [arguments[0] for arguments in commands(page)]
    assert {"inspect", "init", "run"} == set(said)
    for arguments in commands(page):
        if arguments[0] != "run":
            done = invoke(*arguments, *(["--overwrite"] if arguments[0] == "init" else []))
            assert done.exit_code == 0, f"{arguments}\n{done.output}"
    assert re.fullmatch(r"runs/probe(-\d+)?", str(load_config(Path("probe.yaml")).output_dir))
    (config,) = blocks(page, "yaml")
    Path("probe.yaml").write_text(config)
    (run,) = (arguments for arguments in commands(page) if arguments[0] == "run")
    assert load_config(Path("probe.yaml"), allow_code="--allow-code" in run).checkpoint.is_dir()


def test_the_adapter_of_openrlhf_gets_its_configuration(lay_out):
    lay_out("openrlhf LoRA")
    (code,) = blocks("openrlhf", "python")
    first = next(commands("openrlhf"))
    assert invoke(*first).exit_code == 2
    exec(re.sub(r"r=16, .*?\]", "**LORA", code), {"LORA": LORA})
    done = invoke(*first)
    assert done.exit_code == 0, done.output


def batch(seed: int, advantages: bool) -> Rollouts:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 31, (8, 9), generator=random)
    real = torch.ones_like(ids)
    prompts = torch.arange(8) // 2 + 10 * seed
    more = {"advantages": torch.randn(8, generator=random)} if advantages else {}
    sampled = torch.full((8, 9), -3.4)
    return Rollouts(ids, real, (real.cumsum(1) > 3), prompts, sampled_logprobs=sampled, **more)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_a_run_of_a_page(lay_out, page):
    """With rollouts in the place of its prompts and rewards, which fit no tiny policy."""
    lay_out(page)
    for name, advantages in (("update", True), ("evaluation", False)):
        batch(1 + advantages, advantages).to_parquet(Path(f"{name}.parquet"))
    settings = yaml.safe_load(blocks(page, "yaml")[0])
    settings |= {"rollouts": {"update": "update.parquet", "evaluation": "evaluation.parquet"}}
    Path("probe.yaml").write_text(yaml.safe_dump({k: x for k, x in settings.items() if k not in ("prompts", "reward")}))
    done = invoke("run", "probe.yaml")
    assert done.exit_code == 0, done.output
