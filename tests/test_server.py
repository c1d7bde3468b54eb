"""Rollouts by servers: written with the adapter that was sent, proven each step, and nothing lost when one dies.

The server is the fake of fake_vllm.py, which decodes honestly; tests/test_vllm.py does the same with the real one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import perturb
from fake_vllm import FakeVLLM
from peft import LoraConfig
from runs import contents, free_port, make_trainer, run_two, timeless
from tiny import ROWS, byte_tokenizer, save_tiny

from pgkd_peft import PrivilegedGKDConfig
from pgkd_peft.cli.arguments import parse_train
from pgkd_peft.engines import server as module
from pgkd_peft.engines import servers
from pgkd_peft.engines.proof import Proof, RolloutMismatchError
from pgkd_peft.engines.server import RolloutServerError, Sampling
from pgkd_peft.errors import ConfigError
from pgkd_peft.rollout import generate
from pgkd_peft.rows import Row
from pgkd_peft.run.checkpoint import checkpoints
from pgkd_peft.run.folder import ROLLOUT_FOLDER

FAST = {"learning_rate": 0.3, "warmup_steps": 0, "lr_scheduler_type": "constant"}
SETTINGS = {"lmbda": 1.0, "rollout_engine": "server", "logging_steps": 1, "rollout_log_steps": 0, "_dropout": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def fake(base):
    with FakeVLLM(base) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.001)


def train(base, out, servers, resume=None, **settings):
    urls = [server.url for server in (servers if isinstance(servers, list) else [servers])]
    trainer = make_trainer(base, str(out), settings={**SETTINGS, "rollout_server_url": urls, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry and "train_runtime" not in entry]


# ---- what is written, and by whom ----------------------------------------------------------------------------------


def test_greedy_rollouts_are_our_own_decode(base, fake, tmp_path):
    """With an adapter that changes the answers, and so that the base's own would be others."""
    trainer = make_trainer(base, str(tmp_path / "out"), settings={**SETTINGS, "rollout_server_url": [fake.url]})
    perturb(trainer.model, 0.3)
    prompts = [row["messages"][0]["content"].encode().hex() for row in trainer.train_dataset]
    prompts = [[6 + c % 250 for c in text.encode()] for text in prompts]
    sampling = Sampling(0.0, 12, frozenset(trainer.stop_ids))
    trainer.servers.sync(trainer.model)
    written = trainer.servers.write(prompts, range(len(prompts)), sampling)
    settings = {"max_new_tokens": 12, "stop_ids": trainer.stop_ids, "pad_id": trainer.pad_id}
    with trainer.student_weights() as model:
        own = generate(model, prompts, **settings)
    with trainer.teacher.weights() as model:
        bases = generate(model, prompts, **settings)
    assert [each.ids for each in written] == own
    assert own != bases
    assert [each.ids for each in trainer.servers.write(prompts, range(len(prompts)), sampling, base=True)] == bases


def test_a_run_sends_the_adapter_once_a_step_and_proves_each(base, fake, tmp_path):
    trainer = train(base, tmp_path / "out", fake, max_steps=4, num_generations=2, save_strategy="no")
    mismatch = logged(trainer, "rollout_mismatch")
    assert len(mismatch) == 4
    assert max(mismatch) < 1e-4  # float32 on both sides
    assert len(fake.loads) == 1 + 4  # before training, and each step
    names = [body["lora_name"] for body in fake.loads]
    assert len(set(names)) == len({body["lora_path"] for body in fake.loads}) == 5
    assert fake.adapters == {}  # forgotten at the end
    assert not (tmp_path / "out" / ROLLOUT_FOLDER).exists()
    asked = [body for body in fake.requests if body["model"] in names]
    assert len(asked) == (4 + 3) * 2 * 2  # rows of an epoch, epochs, generations
    assert len({body["seed"] for body in asked}) == len(asked)
    for body in asked:
        assert body["temperature"] == 1.0
        assert body["stop_token_ids"] == sorted(set(trainer.stop_ids))
        assert all(isinstance(token, int) for token in body["prompt"])
    assert all(row.logprobs and len(row.logprobs) == len(row.completion) for row in trainer.last_rows)


def test_the_adapter_that_is_sent_is_the_students_of_that_step(base, fake, tmp_path, monkeypatch):
    """What the fake holds when it answers, against the trainer's own weights at that time."""
    seen = []
    write = servers.RolloutServers.write

    def watched(self, *args, **kwargs):
        if self.name in fake.adapters and self.under_way:
            theirs = {k: v for k, v in fake.adapters[self.name].state_dict().items() if "lora_B" in k}
            ours = {k: v for k, v in trainer.model.state_dict().items() if "lora_B" in k}
            seen.append(max(float((theirs[k] - ours[k]).abs().max()) for k in ours))
            assert float(sum(v.abs().sum() for v in ours.values())) > 0 or len(seen) == 1
        return write(self, *args, **kwargs)

    monkeypatch.setattr(servers.RolloutServers, "write", watched)
    trainer = make_trainer(
        base, str(tmp_path / "out"), settings={**SETTINGS, "rollout_server_url": [fake.url], "max_steps": 3, **FAST}
    )
    trainer.train()
    assert seen == [0.0, 0.0, 0.0]


def test_requests_are_spread_over_servers_and_bounded(base, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "IN_FLIGHT", 2)
    with FakeVLLM(base) as other:
        one = train(base, tmp_path / "two", [fake, other], max_steps=2, save_strategy="no", num_generations=2)
        assert fake.most_at_once <= 2
        assert other.most_at_once <= 2
        names = {body["lora_name"] for body in fake.loads}
        assert names == {body["lora_name"] for body in other.loads}
        shares = [sum(body["model"] in names for body in server.requests) for server in (fake, other)]
        assert shares == [7, 7]  # two steps of 4 and 3 rows, twice each
    alone = train(base, tmp_path / "one", fake, max_steps=2, save_strategy="no", num_generations=2)
    assert [row.completion for row in one.last_rows] == [row.completion for row in alone.last_rows]


@pytest.mark.parametrize("settings", [{"_dropout": 0.3}, {"loss_temperature": 2.0}], ids=["dropout", "temperature"])
def test_where_the_training_pass_is_not_what_a_server_computes_the_rows_are_read_once_more(
    base, fake, tmp_path, settings
):
    trainer = train(base, tmp_path / "out", fake, max_steps=2, save_strategy="no", **settings)
    assert not trainer.proof.in_passing
    assert 0 < len(logged(trainer, "rollout_mismatch")) == 2
    assert max(logged(trainer, "rollout_mismatch")) < 1e-4


def test_tokens_outside_the_loss_are_no_proof_and_no_fault(base, fake, tmp_path):
    trainer = train(base, tmp_path / "out", fake, max_steps=2, save_strategy="no", skip_first_tokens=3)
    assert max(logged(trainer, "rollout_mismatch")) < 1e-4


def test_an_evaluation_is_written_by_the_servers_with_the_weights_of_now(base, fake, tmp_path):
    trainer = make_trainer(
        base,
        str(tmp_path / "out"),
        settings={**SETTINGS, "rollout_server_url": [fake.url]},
        eval_dataset=ROWS,
    )
    perturb(trainer.model, 0.3)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    (entry,) = [entry for entry in trainer.state.log_history if "eval_rollout_mismatch" in entry]
    assert entry["eval_rollout_mismatch"] < 1e-4
    assert len(fake.loads) == 2
    fake.ignore_adapter = True
    with pytest.raises(RolloutMismatchError):
        trainer.evaluate()


def test_two_ranks_share_the_servers(base, fake, tmp_path):
    two = {"use_cpu": True, "ddp_backend": "gloo", "per_device_train_batch_size": 1, "max_steps": 2, "save_steps": 100}
    settings = {**SETTINGS, **two, "rollout_server_url": [fake.url], "_rows": [0] * 8}
    ranks = run_two(base, tmp_path / "out", settings=settings)
    assert all("error" not in rank for rank in ranks), ranks[0]["log"][-3000:] + ranks[1]["log"][-3000:]
    mismatch = [entry["rollout_mismatch"] for entry in ranks[0]["state"] if "rollout_mismatch" in entry]
    assert len(mismatch) == 2
    assert max(mismatch) < 1e-4
    assert len(fake.loads) == 1 + 2  # one rank sends it
    assert ranks[0]["completions"] != ranks[1]["completions"]  # of the same prompt


# ---- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [("ignore_adapter", "They are the base's own"), ("ignore_loads", "neither the student's")],
)
def test_an_adapter_that_is_not_applied_stops_the_run_within_a_step(base, fake, tmp_path, monkeypatch, fault, says):
    """And before the optimizer has moved the weights by it."""
    trainer = make_trainer(
        base, str(tmp_path / "out"), settings={**SETTINGS, "rollout_server_url": [fake.url], "max_steps": 6, **FAST}
    )
    sync, weights = trainer.servers.sync, []

    def watched(student):
        weights.append([p.detach().clone() for p in student.parameters() if p.requires_grad])
        if trainer.state.global_step == 3:
            setattr(fake, fault, True)
        sync(student)

    monkeypatch.setattr(trainer.servers, "sync", watched)
    with pytest.raises(RolloutMismatchError, match=says) as error:
        trainer.train()
    assert trainer.state.global_step == 3
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(weights[-1], after))
    assert re.search(r"0?\.\d+ nats a token off|\d\.\d+ nats a token off", str(error.value))
    assert "--resume" in str(error.value)


def test_one_server_of_several_that_answers_from_the_base_does_not_hide_in_the_mean(base, tmp_path):
    """Measured over all tokens the fault would be within what is accepted."""
    rows = [Row([5, 6], [5, 6], [7, 8, 9], True, 0, logprobs=[-1.0] * 3, server=i % 4) for i in range(8)]
    proof = Proof(0.1, 0.0, True, torch.zeros(4, 2, dtype=torch.float64), ["a", "b", "c", "d"])
    own = torch.full((24,), -1.0)
    own[[i for i in range(24) if (i // 3) % 4 == 2]] = -1.2
    logged = proof.add(rows, own, kept=True)
    assert float(logged["rollout_mismatch"] / logged["proven_tokens"]) == pytest.approx(0.05)
    assert proof.refuses(proof.take().tolist()) == 2
    assert proof.refuses(proof.take().tolist()) is None


def test_log_probabilities_after_the_temperature_are_named(base, fake, tmp_path):
    trainer = make_trainer(
        base,
        str(tmp_path / "out"),
        settings={**SETTINGS, "rollout_server_url": [fake.url], "max_steps": 3, "temperature": 0.4, **FAST},
    )
    fake.processed = True
    with pytest.raises(RolloutMismatchError, match="--logprobs-mode raw_logprobs"):
        trainer.train()


def test_a_server_that_dies_in_a_rollout_is_an_error_and_the_resumed_run_is_the_uninterrupted_one(base, tmp_path):
    port = free_port()
    settings = {"max_steps": 5, "save_steps": 2, "lmbda": 0.7, "gradient_accumulation_steps": 1}
    with FakeVLLM(base, port) as server:
        whole = train(base, tmp_path / "whole", server, **settings)
        steps = len(whole.state.log_history) - 1
    assert 0 < sum(logged(whole, "on_policy")) < steps
    with FakeVLLM(base, port) as server:
        server.die_at = len(server.requests) + 8 + 2 * 2 + 1  # of the start, of two steps, in the third
        with pytest.raises(RolloutServerError) as error:
            train(base, tmp_path / "out", server, **settings)
    last = checkpoints(tmp_path / "out")[0]
    assert last.name in ("checkpoint-2", "checkpoint-4")
    for words in (server.url, "does not answer", str(last), "--resume", "Nothing of this step was counted"):
        assert words in str(error.value)
    with FakeVLLM(base, port) as server:
        resumed = train(base, tmp_path / "out", server, resume=True, **settings)
    assert timeless(resumed.state.log_history) == timeless(whole.state.log_history)
    assert contents(tmp_path / "out" / "checkpoint-5") == contents(tmp_path / "whole" / "checkpoint-5")


def test_a_server_that_is_busy_for_a_moment_is_asked_again(base, fake, tmp_path):
    fake.fail = {9, 10, 14}
    trainer = train(base, tmp_path / "out", fake, max_steps=2, save_strategy="no")
    fake.fail = set()
    again = train(base, tmp_path / "again", fake, max_steps=2, save_strategy="no")
    assert [row.completion for row in trainer.last_rows] == [row.completion for row in again.last_rows]


def test_a_server_that_was_started_anew_no_longer_holds_the_adapter(base, fake, tmp_path, monkeypatch):
    trainer = make_trainer(
        base, str(tmp_path / "out"), settings={**SETTINGS, "rollout_server_url": [fake.url], "max_steps": 3}
    )
    sync = trainer.servers.sync

    def forgotten(student):
        sync(student)
        if trainer.state.global_step == 1:
            fake.adapters.clear()

    monkeypatch.setattr(trainer.servers, "sync", forgotten)
    with pytest.raises(RolloutServerError, match=r"no longer holds the adapter.*no checkpoint yet"):
        trainer.train()


def test_one_rank_that_loses_its_server_stops_both(base, fake, tmp_path):
    two = {"use_cpu": True, "ddp_backend": "gloo", "per_device_train_batch_size": 1, "max_steps": 3, "save_steps": 100}
    fake.die_at = 16 + 2 * 2 + 1  # both ranks' start, one step, in the second
    settings = {**SETTINGS, **two, "rollout_server_url": [fake.url], "_rows": [0] * 8}
    ranks = run_two(base, tmp_path / "out", settings=settings)
    assert [rank["error"] for rank in ranks] == ["RolloutServerError"] * 2, ranks[0]["log"][-3000:]


# ---- refused before a model is loaded ------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    """Fails when a model is loaded."""
    import pgkd_peft.construction as construction

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(construction, "build_student", load)


def refused(base, out, url, says, lora=None, **settings):
    with pytest.raises((RolloutServerError, ConfigError), match=says) as error:
        make_trainer(
            base,
            str(out),
            settings={**SETTINGS, "rollout_server_url": [url], **settings},
            **({"peft_config": lora} if lora is not None else {}),
        )
    return str(error.value)


def test_servers_that_cannot_serve_the_run_are_named(base, tmp_path, unloaded, monkeypatch):
    dead = f"http://127.0.0.1:{free_port()}"
    assert dead in refused(base, tmp_path, dead, "does not answer: Connection refused")
    with FakeVLLM(base, max_lora_rank=0) as server:
        assert "--enable-lora --max-lora-rank 2" in refused(base, tmp_path, server.url, "LoRA is not enabled")
    with FakeVLLM(base, max_lora_rank=None) as server:
        refused(base, tmp_path, server.url, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True")
    with FakeVLLM(base, max_lora_rank=16) as server:
        lora = LoraConfig(r=64, target_modules=["q_proj"], task_type="CAUSAL_LM")
        refused(base, tmp_path, server.url, "--max-lora-rank 64 or more", lora=lora)
        for name, value in (("use_dora", True), ("alpha_pattern", {"q_proj": 3}), ("modules_to_save", ["norm"])):
            lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **{name: value})
            refused(base, tmp_path, server.url, name, lora=lora)
        server.max_model_len = 40
        refused(base, tmp_path, server.url, "--max-model-len")
        server.key = "secret"
        refused(base, tmp_path, server.url, "VLLM_API_KEY")
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        refused(base, tmp_path, server.url, "--max-model-len")
        assert server.requests == []
    other = byte_tokenizer()
    other.add_tokens(["user", "Box"])
    with FakeVLLM(base, tokenizer=other) as server:
        refused(base, tmp_path, server.url, "other token ids")


def test_another_base_is_refused_before_training(base, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    with FakeVLLM(other) as server:
        said = refused(base, tmp_path / "out", server.url, "not the base that trains")
    assert "checkpoint" not in said


def test_a_server_that_stops_by_itself_is_named(base, fake, tmp_path):
    trainer = make_trainer(base, str(tmp_path / "out"), settings={**SETTINGS, "rollout_server_url": [fake.url]})
    sampling = Sampling(1.0, 8, frozenset(trainer.stop_ids))
    prompt = [10, 20, 30]
    (made,) = trainer.servers.write([prompt], [5], sampling)
    fake.default_stop = made.ids[0]
    with pytest.raises(RolloutServerError, match="--generation-config vllm"):
        trainer.servers.write([prompt], [5], sampling)


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("http://a:8000", ["http://a:8000"]),
        ("http://a:8000, https://b/v1", ["http://a:8000", "https://b"]),
        (["http://a:1/", "http://[::1]:2/v1/"], ["http://a:1", "http://[::1]:2"]),
    ],
)
def test_addresses(given, urls):
    config = PrivilegedGKDConfig(output_dir="x", report_to="none", rollout_engine="server", rollout_server_url=given)
    assert config.rollout_server_url == urls


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rollout_engine": "server"}, "rollout_server_url names none"),
        ({"rollout_server_url": ["http://a:1"]}, "Set rollout_engine to server"),
        *(
            ({"rollout_engine": "server", "rollout_server_url": [url]}, "http://HOST:PORT")
            for url in (
                "localhost:8000",
                "ftp://a",
                "http://",
                "http://a:port",
                "http://a:99999",
                "http://a:1/generate",
                "",
            )
        ),
        ({"rollout_engine": "server", "rollout_server_url": ["http://me:secret@a:1"]}, "VLLM_API_KEY"),
        ({"rollout_engine": "server", "rollout_server_url": "http://a:1", "teacher_takeover": 0.2}, "teacher_takeover"),
        ({"rollout_engine": "server", "rollout_server_url": "http://a:1", "rollout_server_timeout": 0}, "more than 0"),
        (
            {"rollout_engine": "server", "rollout_server_url": "http://a:1", "rollout_mismatch_tolerance": -1},
            "rollout_mismatch_tolerance",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        PrivilegedGKDConfig(output_dir="x", report_to="none", **settings)
    assert "secret" not in str(error.value)


def test_flags_and_recipes_take_one_address_or_several(tmp_path):
    told = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--report_to", "none"]
    flags = ["--rollout_engine", "server", "--rollout_server_url", "http://a:1", "http://b:2"]
    assert parse_train([*told, *flags])[2].rollout_server_url == ["http://a:1", "http://b:2"]
    recipe = tmp_path / "r.yaml"
    for value, urls in (("http://a:1", ["http://a:1"]), (["http://a:1", "http://b:2"], ["http://a:1", "http://b:2"])):
        recipe.write_text(json.dumps({"rollout_engine": "server", "rollout_server_url": value}))
        assert parse_train([*told, "--config", str(recipe)])[2].rollout_server_url == urls


def test_without_rollouts_no_server_is_asked(base, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    trainer = make_trainer(base, str(tmp_path), settings={**SETTINGS, "rollout_server_url": [url], "lmbda": 0.0})
    assert trainer.servers is None
    assert not (Path(tmp_path) / ROLLOUT_FOLDER).exists()
