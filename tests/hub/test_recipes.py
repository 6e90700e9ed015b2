"""Recipes on the Hub: the unmodified client against the stand-in."""

import json

import yaml

PUSH = """
from hf_coat import CoatConfig, CoatOptimizerConfig, HfCoatConfig
recipe = HfCoatConfig(optimizer=CoatOptimizerConfig(group_size=64))
said["url"] = recipe.push_to_hub("user/recipe")
first = said["url"].rpartition("/")[2]
HfCoatConfig(optimizer=CoatOptimizerConfig(group_size=32)).push_to_hub("user/recipe", commit_message="finer")
recipe.push_to_hub("user/secret", private=True)

said["latest"] = HfCoatConfig.from_pretrained("user/recipe").optimizer.group_size
said["pinned"] = HfCoatConfig.from_pretrained("user/recipe", revision=first).optimizer.group_size
said["at"] = HfCoatConfig.resolve(f"user/recipe@{first}").optimizer.group_size
said["secret"] = HfCoatConfig.from_pretrained("user/secret") == recipe
"""

# Whatever goes wrong, by name: the error's type and all that it says.
ERRORS = """
import os
from hf_coat import HfCoatConfig
from hf_coat.integrations.hub import fetch

def attempt(name, *args, **kwargs):
    try:
        HfCoatConfig.from_pretrained(*args, **kwargs)
    except (OSError, TypeError, ValueError) as error:
        said[name] = [type(error).__name__, " ".join([str(error), *getattr(error, "__notes__", ())])]
    else:
        said[name] = None

for name, args, kwargs in json.loads(sys.argv[1]):
    attempt(name, *args, **kwargs)
said["files"] = sorted(os.listdir("."))
"""


def test_push_and_pull(hub):
    said = hub.run(PUSH)
    assert (said["latest"], said["pinned"], said["at"], said["secret"]) == (32, 64, 64, True)
    files = hub.repos["user/recipe"].at("main")[1]
    assert set(files) == {".gitattributes", "coat_config.json", "README.md"}
    assert json.loads(files["coat_config.json"])["optimizer"]["group_size"] == 32
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "hf_coat" and "coat" in metadata["tags"]
    assert 'coat="user/recipe"' in card and "`group_size` | `32`" in card
    assert hub.repos["user/secret"].private

    # by the training arguments, from the cache alone, and not what was never fetched
    offline = """
from hf_coat import TrainingArguments
args = TrainingArguments(output_dir="run", coat="user/recipe", use_cpu=True)
said["size"] = args.coat.optimizer.group_size
from hf_coat import HfCoatConfig
try:
    HfCoatConfig.from_pretrained("user/other")
except OSError as error:
    said["other"] = str(error)
"""
    hub.requests.clear()
    said = hub.run(offline, offline=True)
    assert said["size"] == 32 and "not in the local cache" in said["other"] and not hub.requests


def test_what_goes_wrong_is_said(hub):
    def put(name, content, file="coat_config.json"):
        hub.new_repo(name).commit({file: content if isinstance(content, bytes) else content.encode()})

    put("user/good", "{}")
    put("user/fresh", "{}")
    put("user/none", "text", file="README.md")
    put("user/corrupt", '{"model": ')
    put("user/deep", "[" * 100_000)
    put("user/number", '{"optimizer": {"group_size": ' + "9" * 5000 + "}}")
    put("user/infinite", '{"optimizer": {"group_size": 1e999}}')
    put("user/binary", b"\xff\xfe\x00")
    put("user/large", " " * (2**20 + 1))
    put("user/list", "[1, 2]")
    put("user/newer", '{"hf_coat_version": "99.0", "schedule": 1}')
    put("user/version", '{"hf_coat_version": ["1"]}')
    put("user/unknown", '{"model": {"__class__": "os.system"}}')
    put("user/paths", '{"model": {"modules_to_not_convert": "../../etc/passwd"}}')
    hub.new_repo("user/secret", private=True).commit({"coat_config.json": b"{}"})
    cases = [
        ["fine", ["user/good"], {}],
        ["missing repository", ["user/nowhere"], {}],
        ["missing revision", ["user/good"], {"revision": "v7"}],
        ["revision in the name", ["user/good@v7"], {}],
        ["missing file", ["user/none"], {}],
        ["wrong token", ["user/fresh"], {"token": "hf_wrong"}],
        ["token of another", ["user/secret"], {"token": "hf_other"}],
        *([name, [f"user/{name}"], {}] for name in (
            "corrupt", "deep", "number", "infinite", "binary", "large", "list", "newer", "version", "unknown", "paths",
        )),
        ["path trick", ["../../etc/passwd"], {}],
        ["dots", ["user/..", ], {}],
    ]  # fmt: skip
    said = hub.run(ERRORS, json.dumps(cases))
    assert said.pop("fine") is None
    expected = {
        "missing repository": ("OSError", "no repository on the Hub", "hf auth login", "'lean', 'paper'"),
        "missing revision": ("OSError", "no revision 'v7'"),
        "revision in the name": ("OSError", "no revision 'v7'"),
        "missing file": ("OSError", "has no coat_config.json"),
        "wrong token": ("OSError", "user/fresh"),
        "token of another": ("OSError", "'user/secret'", "token="),
        "corrupt": ("ValueError", "coat_config.json of 'user/corrupt'", "not valid JSON"),
        "deep": ("ValueError", "not valid JSON"),
        "number": ("ValueError", "coat_config.json of 'user/number'"),
        "infinite": ("TypeError", "group_size is inf"),
        "binary": ("ValueError", "not valid JSON"),
        "large": ("ValueError", "1,048,577 bytes"),
        "list": ("TypeError", "read from a dict"),
        "newer": ("ValueError", "99.0", "Upgrade"),
        "version": ("TypeError", "hf_coat_version"),
        "unknown": ("TypeError", "__class__", "its keys are"),
        "paths": ("TypeError", "modules_to_not_convert"),
        "path trick": ("ValueError", "no preset"),
        "dots": ("ValueError", "no preset"),
    }
    files = said.pop("files")
    assert set(said) == set(expected)
    for name, (kind, *texts) in expected.items():
        assert said[name] is not None, name
        assert said[name][0] == kind and all(text in said[name][1] for text in texts), (name, said[name])
    assert files == ["home"], "nothing is written where the process runs"
