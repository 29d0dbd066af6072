"""What looks like a token is refused before anything is written, and no message repeats it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cankd_hf import evaluate, push, train
from cankd_hf.errors import InputError
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.tokens import holds_secret, is_secret, mask
from cankd_hf.training.arguments import CanKDConfig

SMALL = "output_dir: {}\ndata:\n  path: shapes\nstudent:\n  model: some/model\n"
SECRET = "a1B2" * 9
TOKENS = {
    "hub": f"hf_{SECRET}",
    "github": f"ghp_{SECRET}",
    "openai": f"sk-{SECRET}",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "password": "https://user:pa55word@host.example/x",
    "token in a url": f"https://{SECRET}@host.example/x",
    "query": f"https://host.example/x?access_token={SECRET}",
    "environment": "my-own-private-token",
}
HARMLESS = [
    *(
        "runs/hf_transformers",
        "me/hf_model",
        "a@b",
        "http://host:8080/a@b",
        "f9e44c8a1b2c3d4e5f60718293a4b5c6d7e8f901",
    ),
    *("train[:90%]", "git@github.com:me/name", "num_register_tokens", "sketch", "https://huggingface.co/me/name?a=b"),
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", TOKENS["environment"])


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_anywhere_is_refused_in_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    token, out = TOKENS[kind], tmp_path / "out"
    file = tmp_path / "x.yaml"
    for text, overrides in (
        (f"# {token}\n", []),
        (f"training:\n  run_name: '{token}'\n", []),
        (f"training: [{token}\n", []),
        (f"hub: {{tags: [a, '{token}']}}\n", []),
        ("", [f"data.path={token}"]),
        ("", [f"training.lr_scheduler_kwargs={{a: '{token}'}}"]),
        ("", [f"{token}=1"]),
    ):
        file.write_text(SMALL.format(out) + text)
        assert train.main([str(file), *overrides]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "tokens are not taken as settings" in line and token not in line and SECRET not in line
        assert token not in caplog.text and not out.exists()
    assert evaluate.main(["somewhere", f"data.path={token}"]) == 2
    assert token not in capsys.readouterr().err
    with pytest.raises(InputError, match="run_name: tokens are not taken") as caught:
        CanKDConfig(str(out), run_name=token, report_to="none")
    assert token not in str(caught.value)


@pytest.mark.parametrize("words", [["--message", "{}"], ["--revision", "{}"]])
def test_a_push_does_not_publish_one(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert push.main(["folder", "me/name", *(word.format(TOKENS["hub"]) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words[0][2:]}: looks like a token") and TOKENS["hub"] not in line


@pytest.mark.parametrize(
    "override", ["training.hub_token=abc", "wandb_api_key=abc", "hub.token=abc", "student.config.password=abc"]
)
def test_settings_that_are_named_like_secrets(override: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(SMALL.format("out"), [override, "training.max_step=3"], "x.yaml")
    key = override.partition("=")[0]
    said = [
        problem for problem in caught.value.problems if problem.startswith(f"{key} (command line): tokens are not")
    ]
    assert len(said) == 1 and "abc" not in str(caught.value)
    assert any("training.max_step " in problem for problem in caught.value.problems), "all problems are told"


def test_what_is_no_token() -> None:
    assert not [text for text in HARMLESS if holds_secret(text)]
    settings = {"num_register_tokens": 4, "mask_token": "[MASK]", "image_token": "<image>", "use_mask_token": True}
    settings |= {"average_tokens_across_devices": True, "tokenizer": "me/name", "hub_token": None, "pad_token_id": 0}
    assert not [key for key, value in settings.items() if is_secret(key, value)]
    assert mask("a https://u:p@h/x b hf_" + SECRET) == "a https://***@h/x b ***"
