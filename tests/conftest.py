"""What tests of several verbs need."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

# The first call into a library may load or compile for a second.
settings.register_profile("optimum-qguard", deadline=None)
settings.load_profile("optimum-qguard")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of two layers in BF16; only to be read."""
    folder = tmp_path_factory.mktemp("tiny-llama") / "model"
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """An empty Hub on this machine; processes reach it with its ``environment``."""
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """The same, and it is the Hub of the clients in this process, with a cache of its own."""
    hub_server.use_here(monkeypatch, tmp_path / "hf-home")
    return hub_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium of the operating system."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
