"""`cpugrpo push` sends the model and its card, nothing about the machine, and explains refusals."""

from __future__ import annotations

import httpx
import pytest
from command_line import invoke
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.push import push

SENT = ["README.md", "adapter/adapter_model.safetensors", "config.json", "model.safetensors"]
KEPT = ["record.json", "lessons.jsonl", "metrics.jsonl", "adapter/README.md", ".cache/x.json"]


class Hub:
    """Takes what HfApi would send, by the hub's own rule for patterns."""

    def __init__(self, error=None):
        self.error, self.repo, self.sent = error, None, None

    def create_repo(self, name, *, private, exist_ok):
        if self.error:
            raise self.error
        self.repo = (name, private, exist_ok)
        return f"https://hub.example/{name}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, ignore_patterns, **_):
        names = [p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*.*")]
        files = [name for name in names if (folder_path / name).is_file()]
        rules = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        self.sent = sorted(filter_repo_objects(files, **rules))


@pytest.fixture
def model(tmp_path):
    for name in (*SENT, *KEPT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


@pytest.mark.parametrize("private", [True, False])
def test_the_model_and_its_card_are_sent_and_nothing_else(model, private):
    hub = Hub()
    assert push(model, "me/first", private=private, api=hub) == "https://hub.example/me/first"
    assert hub.repo == ("me/first", private, True)
    assert hub.sent == SENT


@pytest.mark.parametrize("target", ["first", "me/first/model", "me/", "me/fir st"])
def test_a_target_that_is_no_hub_id_is_refused_before_anything_is_sent(model, target):
    hub = Hub()
    with pytest.raises(UserError, match="owner/name"):
        push(model, target, api=hub)
    assert hub.repo is None


@pytest.mark.parametrize(
    ("missing", "words"), [("README.md", "no model card"), ("*.safetensors", "no saved model")]
)
def test_what_is_incomplete_is_refused_before_anything_is_sent(model, missing, words):
    hub = Hub()
    for path in list(model.rglob(missing)):
        path.unlink()
    with pytest.raises(UserError, match=words):
        push(model, "me/first", api=hub)
    assert hub.repo is None


RESPONSE = httpx.Response(403, request=httpx.Request("POST", "https://hub.example"))


@pytest.mark.parametrize(
    "error",
    [
        LocalTokenNotFoundError("no token"),
        HfHubHTTPError("403 Forbidden", response=RESPONSE),
        httpx.ConnectError("no network"),
    ],
)
def test_a_refusal_says_how_to_go_on(model, error):
    with pytest.raises(UserError, match=r"hf auth login"):
        push(model, "me/first", api=Hub(error))


def test_the_command_gives_the_address(model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    code, out, _ = invoke("push", model, "me/first")
    assert code == 0 and out.strip() == "https://hub.example/me/first"
    code, _, err = invoke("push", model / "nowhere", "me/first")
    assert code == 2 and "runs/first/model" in err
