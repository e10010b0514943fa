"""models.toml: what is read, and the one line for each thing that can be wrong in it."""

from __future__ import annotations

import json
import os
import pwd
import shutil
from pathlib import Path

import pytest

from prism_sgl import config_table, machine
from prism_sgl.allocator.ledger import Ledger
from prism_sgl.config import (
    Config,
    DeviceConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    Slo,
    load,
    log_dir,
    restore,
    save,
)
from prism_sgl.errors import EXIT_CONFIG, ConfigError
from tests.model_folders import write_model

ROOT = Path(__file__).parents[1]
HOST = '[[devices]]\nname = "host0"\nkind = "host"\nmemory = "1GiB"\n'
CHAT = '[models.chat]\npath = "MODEL"\n'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """100 MiB of weights, 4 KiB of KV a token, 2048 tokens: 8 MiB for one request."""
    return write_model(
        tmp_path / "model", weights_bytes=100 << 20, layers=8, kv_heads=2, head_dim=64, context=2048
    )


def read(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "models.toml"
    file.write_text(text.replace("MODEL", str(tmp_path / "model")))
    return load(file)


def error(tmp_path: Path, text: str) -> str:
    """The message without the path of the file before it and with MODEL for the model's folder."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert caught.value.exit_code == EXIT_CONFIG
    message = str(caught.value)
    assert "\n" not in message
    prefix = f"{tmp_path / 'models.toml'}: "
    assert message.startswith(prefix)
    return message.removeprefix(prefix).replace(str(tmp_path / "model"), "MODEL")


def test_the_file_of_the_readme(tmp_path: Path, model: Path) -> None:
    config = read(
        tmp_path,
        """
        [server]
        host = "127.0.0.1"
        port = 30000
        [[devices]]
        name = "host0"
        kind = "host"
        memory = "1GiB"
        [models.chat]
        path = "MODEL"
        aliases = ["small"]
        slo = { ttft_ms = 1000, tpot_ms = 100 }
        priority = 0
        pin = false
        min_kv = "64MiB"
        max_kv = "512MiB"
        engine_args = { context_length = 2048 }
        """,
    )
    assert config.devices == (DeviceConfig(name="host0", kind="host", memory_bytes=1 << 30),)
    assert config.models == {
        "chat": ModelConfig(
            name="chat",
            path=str(model),
            aliases=("small",),
            slo=Slo(ttft_s=1.0, tpot_s=0.1),
            min_kv_bytes=64 << 20,
            max_kv_bytes=512 << 20,
            engine_args={"context_length": 2048},
            weights_bytes=100 << 20,
            kv_bytes_per_token=4096,
            context_tokens=2048,
        )
    }


def test_all_that_is_not_given_has_a_default(tmp_path: Path, model: Path) -> None:
    config = read(tmp_path, HOST + CHAT)
    assert config.server == ServerConfig(run_dir=config.server.run_dir)
    assert config.memory == MemoryConfig()
    assert config.scheduler == SchedulerConfig()


def test_sizes_and_times_carry_their_unit(tmp_path: Path, model: Path) -> None:
    config = read(
        tmp_path,
        '[server]\nmax_body = "1.5MiB"\nactivation_timeout = "5m"\ndrain_timeout = 2.5\n'
        '[memory]\nkv_page = 4194304\nhost_cache = "10GB"\n[scheduler]\nmin_residence = "200ms"\n'
        + HOST
        + CHAT,
    )
    assert config.server.max_body_bytes == 3 << 19
    assert config.server.activation_timeout_s == 300.0
    assert config.server.drain_timeout_s == 2.5
    assert config.memory.kv_page_bytes == 4 << 20
    assert config.memory.host_cache_bytes == 10**10
    assert config.scheduler.min_residence_s == 0.2


def test_without_devices_half_of_the_hosts_memory(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "num_gpus", lambda: 0)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 3 << 30)
    assert read(tmp_path, CHAT).devices == (DeviceConfig(name="host0", kind="host", memory_bytes=3 << 29),)


def test_without_devices_gpus_need_their_memory(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "num_gpus", lambda: 2)
    assert error(tmp_path, CHAT) == (
        "devices is missing on a machine with 2 GPUs; "
        'give each a table [[devices]] with name, kind = "cuda", index and memory, e.g. "70GiB"'
    )


def test_hub_id_is_left_to_sglang(tmp_path: Path) -> None:
    chat = read(tmp_path, HOST + '[models.chat]\npath = "org/Model-1.5"\n').models["chat"]
    assert (chat.path, chat.weights_bytes, chat.context_tokens) == ("org/Model-1.5", 0, 0)


def test_what_the_hubs_cache_has_is_read_like_a_folder(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as huggingface_hub does it: a commit's snapshot, found by what a branch points to."""
    repository = tmp_path / "cache/models--org--Model-1.5"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc123")
    shutil.copytree(model, repository / "snapshots/abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    text = HOST + '[models.chat]\npath = "org/Model-1.5"\n'
    folder = read(tmp_path, HOST + CHAT).models["chat"]
    chat = read(tmp_path, text).models["chat"]
    assert chat.path == "org/Model-1.5"
    assert (chat.weights_bytes, chat.kv_bytes_per_token, chat.context_tokens) == (
        folder.weights_bytes,
        folder.kv_bytes_per_token,
        folder.context_tokens,
    )
    assert chat.weights_bytes > 0
    # Of a model that is only half there SGLang fetches the rest: no mistake of the configuration.
    next((repository / "snapshots/abc123").glob("*.safetensors")).write_bytes(b"half")
    assert read(tmp_path, text).models["chat"].weights_bytes == 0


def test_home_is_expanded(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(tmp_path, HOST + '[models.chat]\npath = "~/model"\n').models["chat"].path == str(model)


ERRORS = {
    # keys
    "[sever]\nport = 1\n": "sever is not a known key; did you mean server?",
    "[server]\nprot = 1\n": "server.prot is not a known key; did you mean port?",
    '[server]\nmax-body = "1MiB"\n': "server.max-body is not a known key; did you mean max_body?",
    "[scheduler]\nwindow_s = 60\n": "scheduler.window_s is not a known key; did you mean window?",
    HOST + CHAT + "weights = 1\n": (
        "models.chat.weights is not a known key; known keys: aliases, block_tokens, devices, engine_args, "
        "env, kv_share, max_kv, min_kv, path, pin, preload, priority, slo"
    ),
    HOST + CHAT + 'min_kvs = "1GiB"\n': "models.chat.min_kvs is not a known key; did you mean min_kv?",
    HOST + CHAT + "slo = { ttft = 1 }\n": "models.chat.slo.ttft is not a known key; did you mean ttft_ms?",
    "server = 3\n": "server is 3, not a table; write it as [server]",
    # values
    "[server]\nport = 0\n": "server.port is 0; give a whole number from 1 to 65535, e.g. 30000",
    "[server]\nport = 65536\n": "server.port is 65536; give a whole number from 1 to 65535, e.g. 30000",
    '[server]\nport = "http"\n': 'server.port is "http"; give a whole number from 1 to 65535, e.g. 30000',
    "[server]\nport = true\n": "server.port is true; give a whole number from 1 to 65535, e.g. 30000",
    "[server]\nhost = 1\n": 'server.host is 1; give text, e.g. "127.0.0.1"',
    '[server]\nhost = ""\n': 'server.host is ""; give text, e.g. "127.0.0.1"',
    '[server]\napi_keys = "secret"\n': 'server.api_keys is not a list of texts; give e.g. ["a-long-secret"]',
    '[server]\nmax_body = "1XB"\n': 'server.max_body is "1XB"; give a size, e.g. "32MiB"',
    "[server]\nmax_body = 5\n": 'server.max_body is 5; give at least 1KiB, e.g. "32MiB"',
    "[server]\nmax_queue = 0\n": "server.max_queue is 0; give a whole number of 1 or more, e.g. 1024",
    '[server]\ndrain_timeout = "-1s"\n': (
        'server.drain_timeout is "-1s"; give a time, e.g. "30s" or 30 (seconds)'
    ),
    "[server]\ndrain_timeout = -1\n": 'server.drain_timeout is -1; give a time, e.g. "30s" or 30 (seconds)',
    "[server]\ndrain_timeout = nan\n": 'server.drain_timeout is nan; give a time, e.g. "30s" or 30 (seconds)',
    '[server]\nlog_level = "loud"\n': (
        'server.log_level is "loud"; give "debug" or "info" or "warning" or "error"'
    ),
    '[memory]\nkv_page = "3MiB"\n': 'memory.kv_page is "3MiB"; give a multiple of 2MiB, e.g. "2MiB"',
    '[memory]\nweights_page = "1MiB"\n': 'memory.weights_page is "1MiB"; give at least 2MiB, e.g. "2MiB"',
    "[scheduler]\nmin_move_gain = -0.1\n": (
        "scheduler.min_move_gain is -0.1; give a number from 0 to 10, e.g. 0.1"
    ),
    '[scheduler]\nwindow = "0s"\n': 'scheduler.window is "0s"; give at least 1 s, e.g. "60s" or 60 (seconds)',
    "[scheduler]\nmax_wait = 0\n": 'scheduler.max_wait is 0; give at least 0.1 s, e.g. "10s" or 10 (seconds)',
    '[scheduler]\nmove_drain = "500ms"\n': (
        'scheduler.move_drain is "500ms"; give at least 1 s, e.g. "5m" or 300 (seconds)'
    ),
    # devices
    'devices = "host0"\n': 'devices is "host0", not a list of tables; write each as [[devices]]',
    '[[devices]]\nkind = "host"\n': 'devices[0].name is missing; give e.g. name = "host0"',
    '[[devices]]\nname = "host0"\nkind = "host"\n': (
        'devices.host0.memory is missing; give the budget that all models share, e.g. memory = "1GiB"'
    ),
    '[[devices]]\nname = "host0"\nkind = "cpu"\nmemory = "1GiB"\n': (
        'devices.host0.kind is "cpu"; give "host" or "cuda"'
    ),
    '[[devices]]\nname = "host0"\nkind = "host"\nmemory = -1\n': (
        'devices.host0.memory is -1; give a size, e.g. "1GiB"'
    ),
    '[[devices]]\nname = "a b"\nkind = "host"\nmemory = "1GiB"\n' + CHAT: (
        "devices[0].name is 'a b'; use letters, digits, _ and - only, beginning with a letter or digit"
    ),
    HOST + HOST + CHAT: 'devices[1].name is "host0", which another device is too; rename one',
    '[[devices]]\nname = "a"\nkind = "cuda"\nmemory = "1GiB"\n'
    '[[devices]]\nname = "b"\nkind = "cuda"\nmemory = "1GiB"\n' + CHAT: (
        "devices.b.index is 0, which devices.a is too; give each GPU one device"
    ),
    # models
    HOST: 'models is empty; add a table, e.g. [models.chat] with path = "/models/chat"',
    HOST + "[models.chat]\n": 'models.chat.path is missing; give e.g. path = "/models/chat"',
    HOST + '[models.chat]\npath = "/no/such/folder"\n': (
        'models.chat.path is "/no/such/folder", which does not exist; give the folder of the model\'s files'
    ),
    HOST + '[models.chat]\npath = "nowhere"\n': (
        'models.chat.path is "nowhere", which does not exist; give the folder of the model\'s files'
    ),
    HOST + '[models.chat]\npath = "/"\n': (
        'models.chat.path is "/", which has no config.json; give the folder of the model\'s files'
    ),
    HOST + '[models."a b"]\npath = "MODEL"\n': (
        "models.a b has the name 'a b'; use letters, digits and . _ / + - only, beginning with a letter or digit"
    ),
    HOST + '[models."qwen:7b"]\npath = "MODEL"\n': (
        "models.qwen:7b has the name 'qwen:7b', and SGLang reads what follows a colon as an adapter; "
        "use letters, digits and . _ / + - only, beginning with a letter or digit"
    ),
    HOST + CHAT + 'aliases = ["chat:small"]\n': (
        "models.chat.aliases has the name 'chat:small', and SGLang reads what follows a colon as an adapter; "
        "use letters, digits and . _ / + - only, beginning with a letter or digit"
    ),
    HOST + CHAT + 'aliases = ["x"]\n[models.x]\npath = "MODEL"\n': (
        'models.x is "x", which models.chat.aliases is too; give each model names of its own'
    ),
    HOST + CHAT + 'aliases = ["chat"]\n': (
        'models.chat.aliases is "chat", which models.chat is too; give each model names of its own'
    ),
    HOST + '[models."a/b"]\npath = "MODEL"\n[models.a_b]\npath = "MODEL"\n': (
        "models.a_b cannot be told from models.a/b in file names; rename one of them"
    ),
    HOST + CHAT + "aliases = [1]\n": ('models.chat.aliases is [1], not a list of texts; give e.g. ["small"]'),
    HOST + CHAT + "slo = { ttft_ms = -1 }\n": (
        "models.chat.slo.ttft_ms is -1; give a time in milliseconds, e.g. 2000"
    ),
    HOST + CHAT + 'slo = { tpot_ms = "fast" }\n': (
        'models.chat.slo.tpot_ms is "fast"; give a time in milliseconds, e.g. 100'
    ),
    HOST + CHAT + "priority = 1.5\n": "models.chat.priority is 1.5; give a whole number, e.g. 0",
    HOST + CHAT + "kv_share = 0\n": "models.chat.kv_share is 0; give a number from 0.001 to 1000, e.g. 1",
    HOST + CHAT + 'pin = "yes"\n': 'models.chat.pin is "yes"; give true or false',
    HOST + CHAT + "block_tokens = 0\n": (
        "models.chat.block_tokens is 0; give a power of two up to 1024, e.g. 1"
    ),
    HOST + CHAT + "block_tokens = 48\n": (
        "models.chat.block_tokens is 48; give a power of two up to 1024, e.g. 1"
    ),
    HOST + CHAT + "env = { A = 1 }\n": 'models.chat.env.A is 1; give text, e.g. A = "1"',
    HOST + CHAT + 'env = { CUDA_VISIBLE_DEVICES = "1" }\n': (
        "models.chat.env.CUDA_VISIBLE_DEVICES is set by prism_sgl; use devices of the model and index in [[devices]]"
    ),
    HOST + CHAT + 'devices = ["host1"]\n': (
        'models.chat.devices has "host1", which is no device; did you mean host0?'
    ),
    HOST + CHAT + "engine_args = { page_size = 16 }\n": (
        "models.chat.engine_args.page_size is set by prism_sgl; use block_tokens instead"
    ),
    HOST + CHAT + "engine_args = { context-length = 16 }\n": (
        "models.chat.engine_args.context-length is no name of a SGLang argument; did you mean context_length?"
    ),
    # memory
    HOST + CHAT + 'min_kv = "7MiB"\n': (
        "models.chat.min_kv is 7MiB, less than one request of full length (2048 tokens x 4096 bytes); "
        'give at least "8MiB" or lower engine_args.context_length'
    ),
    HOST + CHAT + 'max_kv = "8MiB"\n': (
        "models.chat.max_kv is 8MiB, less than one request of full length "
        "(2048 tokens x 4096 bytes, in pages of 2MiB); "
        'give at least "10MiB" or lower engine_args.context_length'
    ),
    HOST + CHAT + 'min_kv = "64MiB"\nmax_kv = "32MiB"\n': (
        "models.chat.min_kv is 64MiB, more than max_kv (32MiB); lower it or raise max_kv"
    ),
    HOST.replace("1GiB", "64MiB") + CHAT: (
        "models.chat needs 110MiB (100MiB of them weights, and KV for a request of 2048 tokens), "
        "more than the 64MiB of host0; "
        "give a device more memory, or lower engine_args.context_length or min_kv"
    ),
    HOST.replace("1GiB", "200MiB") + CHAT + 'pin = true\n[models.code]\npath = "MODEL"\npin = true\n': (
        "models.chat.pin is true, but pinned chat, code need 220MiB of the 200MiB on host0; pin fewer models"
    ),
    HOST.replace("1GiB", "300MiB")
    + CHAT
    + 'pin = true\nmin_kv = "100MiB"\n[models.code]\npath = "MODEL"\n': (
        "models.code needs 110MiB, more than the 100MiB that pinned chat leave of the 300MiB on host0; "
        "pin fewer models, or give a device more memory"
    ),
    # syntax
    "[server]\nport =\n": "line 2, column 7 is not TOML (Invalid value); correct it there",
    "[server\n": (
        "line 1, column 8 is not TOML (Expected ']' at the end of a table declaration); correct it there"
    ),
    '[server]\nrun_dir = "/' + "x" * 90 + '"\n' + HOST + CHAT: (
        "server.run_dir makes a socket name of 120 bytes for chat: 13 too many; "
        "give a shorter folder, or shorter names"
    ),
    HOST + CHAT.replace("chat", '"' + "x" * 50 + '"'): (
        f"models.{'x' * 50} makes names of 65 bytes, as {'x' * 50}@host0.99-99999: 1 too many; "
        "give it a shorter one and this one as alias, or host0 a shorter one"
    ),
}


@pytest.mark.parametrize("text", ERRORS, ids=lambda text: " ".join(text.split())[-60:])
def test_each_mistake_is_one_line_with_key_and_remedy(tmp_path: Path, model: Path, text: str) -> None:
    assert error(tmp_path, text) == ERRORS[text]


def test_secret_is_not_shown(tmp_path: Path, model: Path) -> None:
    assert "hunter2" not in error(tmp_path, '[server]\nadmin_keys = ["hunter2", 1]\n')


def test_missing_file_and_broken_text(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"none.toml: the file cannot be read \(No such file or directory\)"
    ):
        load(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"a = \xff")
    with pytest.raises(ConfigError, match="byte 4 is not UTF-8; save the file as UTF-8"):
        load(tmp_path / "bytes.toml")


def test_broken_model_files_are_named(tmp_path: Path, model: Path) -> None:
    (model / "config.json").write_text("{")
    assert error(tmp_path, HOST + CHAT).startswith(
        'models.chat.path is "MODEL", whose config.json cannot be read'
    )


def test_example_file_loads_and_names_every_key(tmp_path: Path, model: Path) -> None:
    text = (ROOT / "models.example.toml").read_text()
    file = tmp_path / "example.toml"
    file.write_text(text.replace("~/.cache/prism_sgl/models/smollm2", str(model)))
    config = load(file)
    assert config.server == ServerConfig(run_dir=config.server.run_dir)
    assert config.memory == MemoryConfig()
    assert config.scheduler == SchedulerConfig()
    words = {line.removeprefix("# ").split(" = ")[0].strip() for line in text.splitlines()}
    not_keys = {"name", "part_of", "weights", "kv_bytes_per_token", "context_tokens"}
    for struct in (ServerConfig, MemoryConfig, SchedulerConfig, DeviceConfig, ModelConfig):
        for key in config_table.keys_of(struct):
            assert key in words or (struct is ModelConfig and key in not_keys), f"{key} is not in the example"


def test_configuration_of_the_readme_loads(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "num_gpus", lambda: 0)
    text = (ROOT / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    assert len(text.strip().splitlines()) == 5
    assert list(read(tmp_path, text.replace("~/.cache/prism_sgl/models/smollm2", "MODEL")).models) == [
        "chat",
        "code",
    ]


def test_demo_is_too_small_for_its_models(tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "model", weights_bytes=269_000_000, layers=30, kv_heads=3, head_dim=64, context=8192
    )
    text = (ROOT / "examples" / "demo.toml").read_text()
    config = read(tmp_path, text.replace("~/.cache/prism_sgl/models/smollm2", str(model)))
    wanted = sum(
        m.weights_bytes + (m.max_kv_bytes or config.devices[0].memory_bytes) for m in config.models.values()
    )
    assert wanted > config.devices[0].memory_bytes


def test_example_slo_keys_are_the_ones_read(tmp_path: Path, model: Path) -> None:
    text = HOST + CHAT + "slo = { ttft_ms = 1500, tpot_ms = 20 }\n"
    assert read(tmp_path, text).models["chat"].slo == Slo(ttft_s=1.5, tpot_s=0.02)


def test_facts_follow_the_engine_arguments(tmp_path: Path, model: Path) -> None:
    text = HOST + CHAT + 'engine_args = { context_length = 100, kv_cache_dtype = "fp8_e5m2" }\n'
    chat = read(tmp_path, text).models["chat"]
    assert (chat.context_tokens, chat.kv_bytes_per_token) == (100, 2048)
    assert json.loads((model / "config.json").read_text())["max_position_embeddings"] == 2048


def test_a_card_needs_room_for_what_an_engine_holds_beside_pages(tmp_path: Path, model: Path) -> None:
    """Context, kernels, graphs and the activations of a prefill: 2 GiB until the engine tells. Pages are larger too."""
    card = HOST.replace("host0", "gpu0").replace('"host"', '"cuda"')
    assert "models.chat needs 2.25GiB" in error(tmp_path, card.replace("1GiB", "2GiB") + CHAT)
    config = read(tmp_path, card.replace("1GiB", "3GiB") + CHAT)
    assert config.memory.kv_page_bytes == config.memory.weights_page_bytes == 128 << 20


def test_max_kv_holds_a_page_of_a_card(tmp_path: Path, model: Path) -> None:
    card = HOST.replace("host0", "gpu0").replace('"host"', '"cuda"').replace("1GiB", "8GiB")
    assert error(tmp_path, card + CHAT + 'max_kv = "64MiB"\n') == (
        "models.chat.max_kv is 64MiB, less than one request of full length "
        "(2048 tokens x 4096 bytes, in pages of 128MiB); "
        'give at least "128MiB" or lower engine_args.context_length'
    )
    assert read(tmp_path, card + CHAT + 'max_kv = "128MiB"\n').models["chat"].max_kv_bytes == 128 << 20


def test_model_needs_one_device_with_room_beside_the_pinned_ones(tmp_path: Path, model: Path) -> None:
    hosts = HOST.replace("1GiB", "200MiB") + HOST.replace("host0", "host1").replace("1GiB", "300MiB")
    code = '[models.code]\npath = "MODEL"\n'

    def pinned(*on: str) -> str:
        return CHAT + f"pin = true\ndevices = {list(on)}\n"

    assert read(tmp_path, hosts + pinned("host0") + code).models["chat"].pin
    assert read(tmp_path, hosts + pinned("host0", "host1") + code).models["chat"].pin, "there is a way"
    assert error(tmp_path, hosts + pinned("host0") + code + 'devices = ["host0"]\n') == (
        "models.code needs 110MiB, more than the 90MiB that pinned chat leave of the 200MiB on host0; "
        "pin fewer models, or give a device more memory"
    )
    # It can be on one of its devices only, whatever it is allowed.
    large = CHAT + 'pin = true\nmin_kv = "110MiB"\n'
    assert error(tmp_path, hosts + large + code + 'min_kv = "110MiB"\n') == (
        "models.code needs 210MiB, more than the 90MiB that pinned chat leave of the 300MiB on host1; "
        "pin fewer models, or give a device more memory"
    )


def test_models_sleep_on_a_second_card_too_unless_told_otherwise(tmp_path: Path, model: Path) -> None:
    def card(index: int) -> str:
        return f'[[devices]]\nname = "gpu{index}"\nkind = "cuda"\nindex = {index}\nmemory = "8GiB"\n'

    assert not read(tmp_path, card(0) + CHAT).scheduler.spares
    assert read(tmp_path, card(0) + card(1) + CHAT).scheduler.spares
    assert not read(tmp_path, "[scheduler]\nspares = false\n" + card(0) + card(1) + CHAT).scheduler.spares
    assert not read(tmp_path, HOST + HOST.replace("host0", "host1") + CHAT).scheduler.spares


def test_name_that_is_just_right_can_own_a_part_of_the_ledger(tmp_path: Path, model: Path) -> None:
    """Also after very many starts: the check stands for a limit that lies elsewhere."""
    read(tmp_path, HOST + CHAT.replace("chat", '"' + "x" * 49 + '"'))
    with Ledger.create(str(tmp_path / "ledger"), 16 << 20, "host0") as ledger:
        ledger.join(f"{'x' * 49}@host0.99-99999", floor=0, ceiling=1, priority=0, bell="").leave()


def test_the_longest_socket_of_an_engine_is_measured(tmp_path: Path, model: Path) -> None:
    folder, name = "/" + "r" * 77, "/rt-chat@host0.99-99999.first"
    assert len(folder + name) == 107, "as long as the kernel takes"
    read(tmp_path, f'[server]\nrun_dir = "{folder}"\n' + HOST + CHAT)
    assert "of 108 bytes for chat: 1 too many" in error(
        tmp_path, f'[server]\nrun_dir = "{folder}r"\n' + HOST + CHAT
    )


def test_model_that_cannot_come_to_a_device_of_a_long_name_may_have_one_itself(
    tmp_path: Path, model: Path
) -> None:
    hosts = HOST + HOST.replace("host0", "h" * 20)
    chat = CHAT.replace("chat", '"' + "x" * 40 + '"')
    assert "or hhhhhhhhhhhhhhhhhhhh a shorter one" in error(tmp_path, hosts + chat)
    read(tmp_path, hosts + chat + 'devices = ["host0"]\n')


def test_run_dir_is_where_logind_removes_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes XDG_RUNTIME_DIR at the last logout of a user who does not linger."""
    lingering = tmp_path / pwd.getpwuid(os.getuid()).pw_name
    name = f"prism_sgl-{os.getuid()}-30000"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/var")  # short: sockets live below it
    monkeypatch.setattr(machine, "LINGER_FOLDER", tmp_path)
    assert read(tmp_path, HOST + CHAT).server.run_dir == f"/tmp/{name}"
    lingering.touch()
    config = read(tmp_path, HOST + CHAT)
    assert config.server.run_dir == f"/var/{name}"
    lingering.unlink()
    assert log_dir(config) == f"/var/{name}/logs", "wherever else it would lie by now"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert read(tmp_path, HOST + CHAT).server.run_dir == f"/tmp/{name}"


def test_saved_configuration_needs_no_other_file(tmp_path: Path, model: Path) -> None:
    text = """
        [server]
        api_keys = ["k"]
        drain_timeout = "1.5s"
        [models.chat]
        path = "MODEL"
        aliases = ["c"]
        priority = 3
        slo = { ttft_ms = 1500 }
        devices = ["host0"]
        engine_args = { context_length = 100, rope = { factor = 2.5, on = true }, list = [1, "a"] }
        """
    config = read(tmp_path, HOST + text)
    saved = tmp_path / "saved"
    save(config, saved)
    assert saved.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(model)
    (tmp_path / "models.toml").unlink()
    assert restore(saved) == config
    assert config.models["chat"].weights_bytes == 100 << 20


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"{", "is not a configuration that this version has written (Input data was truncated)"),
        (b'"\xff"', "is not a configuration that this version has written ("),
        (
            b'{"newer": 1}',
            "is not a configuration that this version has written (Object contains unknown field",
        ),
    ],
)
def test_saved_configuration_that_is_none_is_one_line_with_a_remedy(
    tmp_path: Path, text: bytes | None, problem: str
) -> None:
    file = tmp_path / "saved"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        restore(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: the file {problem}") and "\n" not in message
    assert message.endswith("; start the whole server again, which writes it anew")
