"""One list of wrong inputs to all commands: each ends with one clear line, status 2, and leaves nothing behind.

A case is (arguments, part of the message). `{files}` is a folder with good and bad files, `{out}` an empty folder that
must stay empty.
"""

import contextlib
import importlib
import io
import pathlib
import runpy
import subprocess
import sys

import pytest

import vlm
from vlm.errors import exit_on_user_error
from vlm.models import FAMILIES

ROOT = pathlib.Path(__file__).parents[2]

# ------------------------------------------------------------------------------------------------------- the commands


def _load(argv):
    """`vlm.load(path, **options)`, its error reported as a command's is."""
    with exit_on_user_error():
        vlm.load(argv[0], **dict(argument.split("=", 1) for argument in argv[1:]))


def _main(command):
    if command == "load":
        return _load
    if command in ("train", "eval"):
        return runpy.run_path(str(ROOT / f"{command}.py"))["main"]
    name = f"vlm.{command}" if command in ("precompute", "score", "tasks") else f"vlm.{command}.__main__"
    return importlib.import_module(name).main


# ---------------------------------------------------------------------------------------------------------- the cases

IMAGES = [  # without texts
    "--config.data.sources=({{'kind': 'jsonl', 'path': '{files}/data.jsonl', 'fields': {{'image': 'image'}}}},)",
    *("--config.processor.tokenizer={files}/model", "--config.eval={{}}"),
]
TRAIN = [
    ([], "--config=FILE is missing"),
    (["--config={root}/configs/altclip.py:tiny"], "--workdir=DIR is missing"),
    (["--config=/no.py"], "no such file: /no.py"),
    (["--config={files}"], "expected a .py or .json file"),
    (["--config={files}/config.yaml"], "expected a .py or .json file"),
    (["--config={files}/broken.json"], "not a JSON configuration"),
    (["--config={files}/list.json"], "expected a JSON object, found list"),
    (["--config={files}/nan.json"], "NaN is not a JSON number"),
    (["--config={files}/deep.json"], "not a JSON configuration"),
    (["--config={files}/eval.json:tiny"], "a .json file takes no argument"),
    (["--config={files}/raises.py"], "ZeroDivisionError"),
    (["--config={files}/none.py"], "must return a ConfigDict, found NoneType"),
    (["--config={files}/nothing.py"], "expected a function get_config"),
    (["--config={files}/syntax.py"], "SyntaxError"),
    (["--config={root}/configs/altclip.py:tiy"], "unknown variant 'tiy'"),
    (["--config.train.steps=3"], "needs --config=FILE"),
]
TOY = [  # a run that would start in a second
    (["--config.optimizer.lrr=1"], "config.optimizer.lrr does not exist; did you mean 'lr'?"),
    (["--config.optimiser.lr=1"], "config.optimiser does not exist; did you mean 'optimizer'?"),
    (["--config.model.widht=3"], "config.model.widht does not exist; did you mean 'width'?"),
    (["--config.loss.scale=x"], "config.loss.scale: expected float, found 'x'"),
    (["--config.processor.size=x"], "config.processor.size: expected int, found 'x'"),
    (["--config.family=toi"], "config.family: expected a known family, found 'toi'; did you mean 'toy'?"),
    (["--config.=3"], "expected --config.section.key=value"),
    (["--config.optimizer=3"], "config.optimizer"),
    (["--config.optimizer.lr=fast"], "config.optimizer.lr: expected float, found 'fast'"),
    (["--config.optimizer.lr=-1"], "lr: expected at least 0, found -1"),
    (["--config.optimizer.lr=nan"], "config.optimizer.lr: expected a finite number, found nan"),
    (["--config.optimizer.lr=inf"], "config.optimizer.lr: expected a finite number, found inf"),
    (["--config.eval={{'x': {{'rate': 1e999}}}}"], "config.eval.x.rate: expected a finite number, found inf"),
    (["--config.eval={{'x': {{'rate': {{1}}}}}}"], "config.eval.x.rate: expected a number, text, tuple or mapping"),
    (["--config.optimizer.bounds=(('.*', 2.0, 1.0),)"], "bounds: '.*': expected the lowest value first"),
    (["--config.optimizer.bounds=(('txt/.*', 0.0, 1.0),)"], "config.optimizer.bounds: 'txt/.*' matches no parameter"),
    (["--config.optimizer.decay_exclude=('bais',)"], "config.optimizer.decay_exclude: 'bais' matches no parameter"),
    (["--config.optimizer.name=lion", "--config.optimizer.eps=1e-6"], "eps: lion does not read it; expected 1e-08"),
    (["--config.optimizer.name=adafactor", "--config.optimizer.betas=(0.5, 0.9)"], "betas: adafactor does not read it"),
    (["--config.optimizer.schedule.end_factor=0.1"], "end_factor: a constant schedule does not read it"),
    (["--config.data.prefetch=0"], "config.data: prefetch: expected at least 1, found 0"),
    (["--config.data.timeout_seconds=0"], "config.data: timeout_seconds: expected a positive number, found 0.0"),
    (["--config.data.timeout_seconds=-3.0", "--dry_run"], "timeout_seconds: expected a positive number, found -3.0"),
    (["--config.train.text_lengths=(3,5)"], "config.train.text_lengths: expected at most the 4 tokens of a row, found"),
    (["--config.optimizer.betas=(0.9,)"], "config.optimizer.betas"),
    (["--config.optimizer.betas=(0.9, 1.5)"], "betas: expected values from 0 to below 1"),
    (["--config.optimizer.name=adam"], "config.optimizer.name: expected one of 'adamw'"),
    (["--config.optimizer.ema_decay=2"], "ema_decay: expected a value from 0 to 1"),
    (["--config.optimizer.accumulation_steps=3"], "expected a multiple of 8 devices x 3 micro-batches, found 8"),
    (["--config.optimizer.schedule.name=cosin"], "config.optimizer.schedule.name: expected one of 'constant'"),
    (["--config.optimizer.schedule.warmup_steps=7"], "exceed train.steps=6"),
    (["--config.optimizer.groups=(('imgae/.*', {{}}), ('.*', {{}}))"], "nothing matches the rule imgae"),
    (["--config.optimizer.groups=(('(', {{}}),)"], "regular expression"),
    (["--config.optimizer.groups=(('image/.*', {{}}),)"], "text/kernel"),
    (["--config.optimizer.groups=(('.*', {{'frozen': True}}),)"], "did you mean 'freeze'"),
    (["--config.train.steps=0"], "steps: expected at least 1, found 0"),
    (["--config.train.steps=1.5"], "config.train.steps: expected int"),
    (["--config.train.tensorboard=perhaps"], "config.train.tensorboard: expected bool"),
    (["--config.precision.compute=float8"], "config.precision.compute: expected one of 'float32'"),
    (["--config.remat=al"], "config.remat: expected one of 'none'"),
    (["--config.data.batch_size=6"], "config.data.batch_size: expected a multiple of 8 devices, found 6"),
    (["--config.data.batch_size=0"], "batch_size: expected at least 1, found 0"),
    (["--config.data.max_skip_fraction=2"], "max_skip_fraction: expected a value from 0 to 1"),
    (["--config.data.teacher_cache={files}/empty"], "no objective of toy learns from precomputed embeddings"),
    (["--config.data.sources=()"], "no source given"),
    (["--config.data.sources=3"], "config.data.sources"),
    (["--config.data.sources[0].path=/nowhere.jsonl"], "/nowhere.jsonl"),
    (["--config.data.sources[0].path={files}/garbled.jsonl"], "garbled.jsonl"),
    (["--config.data.sources[0].path={files}/cut.jsonl"], "cut.jsonl"),
    (["--config.data.sources[0].path={files}/nothing.jsonl"], "nothing.jsonl"),
    (["--config.data.sources[0].kind=csv"], "unknown kind 'csv'"),
    (["--config.data.sources[0].kind=tar"], "toy.jsonl"),
    (["--config.data.sources[0].kind=parquet"], "toy.jsonl"),
    (["--config.data.sources[0].kind=tfds"], "toy.jsonl"),
    (["--config.data.sources[0].spilt='[:3]'"], "did you mean 'split'"),
    (["--config.data.sources[0].split=train"], "expected a range"),
    (["--config.data.sources[0].weight=-1.0"], "weight"),
    (["--config.data.sources[0].num_examples=41"], "expected 41 examples, found 40"),
    (["--config.data.sources[0].fields={{'text': 'txet'}}"], "txet"),
    (["--config.sharding.mesh.tensor=3"], "does not fit 8 devices"),
    (["--config.sharding.mesh.fsdp=0"], "expected a number of devices or -1, found 0"),
    (["--config.sharding.mesh.fsdp=-1"], "expected -1 for one axis at most"),
    (["--config.sharding.rules=(('batch', 'rows'),)"], "rows"),
    (["--config.init=({{'path': '/nowhere'}},)"], "/nowhere: no such file or folder"),
    (["--config.init=({{'pth': '/nowhere'}},)"], "did you mean 'path'"),
    (["--config.init=({{'path': '{files}/model'}},)"], "the run has no place for"),
    (["--config.init=({{'path': '{files}/model', 'include': '('}},)"], "is not a regular expression"),
    (["--config.init=({{'path': '{files}/code.pt'}},)"], "code.pt"),
    (["--config.eval={{'x': {{'kind': 'zero'}}}}"], "zero"),
    (["--config.eval={{'x': {{'kind': 'retrieval', 'data': {{'kind': 'jsonl', 'path': '/no.jsonl'}}}}}}"], "/no.jsonl"),
    (
        [
            "--config.eval={{'x': {{'kind': 'captions', 'data': {{'kind': 'jsonl', 'path': '{files}/data.jsonl'}}, "
            "'captions': None}}}}"
        ],
        "config.eval.x: this model and processor cannot write captions",
    ),
    (["--workdir=/proc/nowhere"], "--workdir: cannot write to /proc/nowhere"),
    (["--workdir={files}/names.txt"], "names.txt"),
    (["--num_processes=2"], "need --coordinator"),
    (["--coordinator=here", "--num_processes=2", "--process_id=0"], "expected HOST:PORT, found 'here'"),
    (["--process_id=x"], "--process_id"),
    (["--stray"], "unknown argument --stray"),
    (["--work=x"], "unknown argument --work=x"),
    (["--config=" + 300 * "x" + ".py"], "File name too long: xxx"),
    (["--workdir={out}/" + 300 * "x"], "File name too long"),
]
CLIP = [  # a run of a small CLIP
    (["--config.processor.max_length=78"], "config.processor.max_length: expected at most the 77 positions"),
    (["--config.processor.image.size=32", "--config.processor.image.crop=32"], "expected the 16 x 16 of config.model"),
    (["--config.processor.image.crop=None"], "config.processor.image: expected the 16 x 16"),
    (["--config.processor.mlm_probability=0.5"], "mlm_probability: expected 0 with objective 'contrast"),
    (["--config.processor.tokenizer={files}/model", "--config.model.clip_text.vocab_size=20"],
     "config.model.clip_text.vocab_size: expected at least the 34 tokens of config.processor.tokenizer, found 20"),
    (["--config.loss.teacher={{}}"], "teacher: objective 'contrastive' does not read it; expected None"),
    (["--config.model.lm_head=True"], "config.model: lm_head: CLIP's own text tower does not read it; expected False"),
    (["--config.model.text_transformation_pre=True"], "text_transformation_pre: CLIP's own text tower does not read"),
    (["--config.model.vision.class_token=False"], "config.model: vision.class_token: vision_projection reads its stat"),
    (["--config.data.teacher_cache={files}/empty"], "teacher_cache: objective 'contrastive' learns from no embeddings"),
    (["--config.processor.teacher_tokenizer={files}/model"], "teacher_tokenizer: objective 'contrastive' does not rea"),
    (["--config.processor.teacher_max_length=9"], "teacher_max_length: objective 'contrastive' does not read it"),
    (["--config.train.text_lengths=(8,99)"], "config.train.text_lengths: expected at most the 12 tokens of a row, fou"),
    (["--config.loss.target=projected"], "target: objective 'contrastive' does not read it; expected 'pooled'"),
    (["--config.model.clip_text.activation=geluu"], "found 'geluu'; did you mean 'gelu'?"),
    (["--config.model.vision.num_layers=0"], "config.model.vision: num_layers: expected at least 1, found 0"),
    (["--config.model.clip_text.mlp_dim=-3"], "config.model.clip_text: mlp_dim: expected at least 1, found -3"),
    (IMAGES, "needs tokens, mask; the examples give image"),
    ([*IMAGES, "--dry_run"], "needs tokens, mask; the examples give image"),
]  # fmt: skip
BLIP = [  # settings that do not fit each other
    (["--config.processor.image.size=9"], "config.processor.image: expected the"),
    (["--config.processor.max_length=99"], "config.processor.max_length: expected at most the 20 positions"),
    (["--config.processor.task=vqa"], "config.processor.task: objective 'pretrain' expects pretrain, found vqa"),
    (["--config.loss.objective=vqa"], "config.loss: queue_size: objective 'vqa' does not read it"),
    (["--config.model.itm=False"], "config.loss.objective: 'pretrain' needs config.model.itm"),
    (["--config.model.cls_id=9999"], "config.model.cls_id: expected an id of the"),
    (["--config.model.enc_id=30523"], "config.model.enc_id: expected an id of the"),
]
EVAL = [
    (["--checkpoint=" + 300 * "x"], "File name too long: xxx"),
    (["--config={files}/eval.json"], "--checkpoint=PATH is missing"),
    (["--config={files}/eval.json", "--checkpoint=/nowhere"], "no such file or folder: /nowhere"),
    (["--checkpoint={files}/model"], "--config=FILE is missing"),
]
EVAL_MODEL = [  # with a configuration and a good checkpoint, of which the last one counts
    (["--checkpoint={files}/eval.json"], "eval.json"),
    (["--checkpoint={files}/plain.pt"], "neither a safetensors nor a PyTorch"),
    (["--checkpoint={files}/code.pt"], "code.pt"),
    (["--checkpoint={files}/cut"], "params.safetensors"),
    (["--checkpoint={files}/flipped"], "params.safetensors: corrupted"),
    (["--checkpoint={files}/run"], "run"),
    (["--ema"], "ema"),
    (["--limit=0"], "--limit: expected at least 1, found 0"),
    (["--limit=x"], "--limit"),
    (["--dtype=float8"], "invalid choice: 'float8'"),
    (["--only=pars"], "did you mean 'pairs'"),
    (["--outptu=a"], "did you mean '--output'"),
    (["--output={out}/a.txt"], "ends in .json"),
    (["--output={files}/names.txt/a.json"], "names.txt"),
    (
        ["--config.model.vision.num_heads=3"],
        "--config.model.vision.num_heads would change nothing: the architecture is",
    ),
    (["--config.processor.max_length=1"], "--config.processor.max_length would change nothing: tokenizer and image"),
    (["--config.precision.compute=bfloat16"], "would change nothing: --dtype chooses"),
    (["--config.train.seed=3"], "--config.train.seed would change nothing: only training reads it"),
    (["--config.eval={{}}"], "eval"),
    (["--config.eval.pairs.kind=retrieve"], "did you mean 'retrieval'"),
    (["--config.eval.pairs.caption=1"], "caption"),
    (["--config.eval.pairs.batch_size=0"], "batch_size"),
    (["--config.eval.pairs.data.path=/no.jsonl"], "/no.jsonl"),
    (["--config.eval.animals.classnames=/no.txt"], "/no.txt"),
    (["--config.eval.animals.classnames={files}/latin1.txt"], "expected UTF-8 text, found byte 0xfc"),
    (["--config.eval.animals.classnames={files}/0.png"], "expected UTF-8 text"),
    (["--config.eval.animals.classnames={files}/nothing.txt"], "expected class names, found none"),
    (["--config.eval.animals.classnames={files}/one.txt"], "animals"),
    (["--config.eval.animals.classnames={files}/broken.json"], "not JSON"),
    (["--config.eval.animals.classnames={files}/deep.json"], "not JSON"),
    (["--config.eval.animals.classnames={files}/number.json"], "as a list of strings"),
    (["--config.eval.animals.classnames={files}/gap.json"], "expected class numbers 0 to 1"),
    (["--config.eval.animals.classnames={files}/two.json"], "set `dataset` to one of a, b"),
    (["--config.eval.animals.classnames={files}/two.json", "--config.eval.animals.dataset=c"], "data set 'c'"),
    (["--config.eval.animals.templates={files}/holeless.txt"], "no {{c}} in 'a photo of cat'"),
    (["--config.eval.animals.templates=/no.txt"], "/no.txt"),
    (["--config.eval.animals.language=3"], "language"),
]
PREDICT = [
    ([], "--task"),
    (["--task=paint"], "invalid choice: 'paint'"),
    (["--task=caption", "--image={files}/0.png"], "does not generate text"),
    (["--task=classify", "--text=a", "--text=b"], "needs --image and --text"),
    (["--task=classify", "--image={files}/0.png", "--text=a"], "at least two labels"),
    (["--task=classify", "--image={files}/0.png", "--text=a", "--text="], "empty"),
    (["--task=classify", "--image={files}/0.png", "--text=a", "--text=b", "--template=x"], "no {{c}}"),
    (["--task=retrieve", "--image={files}/0.png", "--text=a", "--top=0"], "at least 1"),
    (["--task=retrieve", "--image={files}/0.png", "--text=a", "--template={{c}}"], "--template belongs"),
    (["--task=embed"], "needs --image or --text"),
    (["--task=embed", "--image=/no.png"], "/no.png"),
    (["--task=embed", "--image={files}/empty"], "no picture in"),
    (["--task=embed", "--image={files}/text.png"], "not a picture"),
    (["--task=embed", "--image={files}/empty.png"], "empty.png"),
    (["--task=embed", "--image={files}/truncated.png"], "truncated.png"),
    (["--task=embed", "--image={files}/0.png", "--image={files}/truncated.png"], "truncated.png"),
    (["--task=embed", "--image={files}/bomb.png"], "bomb.png"),
    (["--task=embed", "--image={files}/page.svg"], "page.svg"),
    (["--task=embed", "--text=@/no.txt"], "/no.txt"),
    (["--task=embed", "--text=@{files}/0.png"], "not UTF-8"),
    (["--task=embed", "--text=@{files}/nothing.txt"], "needs --image or --text"),
    (["--task=embed", "--text=a", "--output={out}/x.json"], "ends in .npy"),
    (["--task=embed", "--text=a", "--output={out}/no/x.npy"], "cannot write"),
    (["--task=embed", "--text=a", "--batch_size=0"], "at least 1"),
    (["--task=embed", "--text=a", "--colour=red"], "--colour"),
]
LOAD = [
    ("/absent", "no such file or folder"),
    ("{files}/empty", "expected one weight file"),
    ("{files}/run", "run"),
    ("{files}/names.txt", "names.txt"),
    ("{files}/0.png", "0.png"),
    ("{files}/plain.pt", "neither a safetensors nor a PyTorch"),
    ("{files}/other.pt", "unknown layout"),
    ("{files}/truncated.pt", "truncated.pt"),
    ("{files}/code.pt", "code.pt"),
    ("{files}/code.pkl", "code.pkl"),
    ("{files}/other.safetensors", "unknown layout"),
    ("{files}/truncated.safetensors", "truncated.safetensors"),
    ("{files}/overlap.safetensors", "overlap.safetensors"),
    ("{files}/header.safetensors", "header.safetensors"),
    ("{files}/dtype.safetensors", "F17"),
    ("{files}/garbled.safetensors", "garbled.safetensors"),
    ("{files}/cut", "params.safetensors"),
    ("{files}/flipped", "params.safetensors: corrupted"),
    ("{files}/bare", "vlm_manifest.json: missing"),
    ("{files}/weightless", "params.safetensors: missing"),
    ("{files}/version", "format version 9, this release reads 1"),
    ("{files}/family", "found 'altclop'; did you mean 'altclip'"),
    ("{files}/key", "model.visio does not exist; did you mean 'vision'"),
    ("{files}/deeper", "expected shape [3, 16], found [2, 16]"),
    ("{files}/json", "config.json"),
    ("{files}/tokenizer", "sentencepiece.bpe.model"),
    ("{files}/model/params.safetensors", "load the folder"),
]
LOAD_OPTIONS = [
    (["{files}/model", "dtype=float8"], "dtype"),
    (["{files}/model", "verify=perhaps"], "verify"),
    (["{files}/model", "ema=yes"], "ema"),
]
CONVERT = [
    ([], "source, target"),
    (["{files}/model"], "target"),
    (["/absent", "{out}/new"], "no such file"),
    (["{files}/model", "{files}/cut"], "exists already"),
    (["{files}/model", "{out}/absent/new"], "no such folder"),
    (["{files}/model", "{files}/names.txt/new"], "names.txt"),
    (["{files}/model", "{out}/new", "--to=tf"], "invalid choice: 'tf'"),
    (["{files}/model", "{out}/new", "--dtype=int8"], "invalid choice: 'int8'"),
    (["{files}/model", "{out}/new", "--seed=x"], "--seed"),
    (["{files}/model", "{out}/new", "--override=x"], "expected KEY=VALUE"),
    (["{files}/model", "{out}/new", "--override=vision.activation=gelu"], "vlm's own"),
    (["{files}/model", "{out}/new", "--to=hf", "--drop=("], "--drop: '(' is not a regular expression"),
    (["{files}/model", "{out}/new", "--to=hf", "--drop=visio/.*"], "matches none of"),
    (["{files}/model", "{out}/new", "--to=hf", "--drop=vision/.*"], "no transformers class holds"),
    (["{files}/model", "{out}/new", "--text=/absent"], "/absent"),
    (["{files}/cut", "{out}/new"], "params.safetensors"),
    (["{files}/code.pt", "{out}/new"], "code.pt"),
    (["{files}/truncated.safetensors", "{out}/new"], "truncated.safetensors"),
    (["{files}/other.pt", "{out}/new"], "unknown layout"),
]
PRECOMPUTE = [
    ([], "--output"),
    (["--output={out}/cache"], "--config=FILE is missing"),
    (["--config=/no.py", "--output={out}/cache"], "/no.py"),
    (["--config={toy}", "--output={out}/cache"], "expected objective 'teacher_learning' with a live teacher"),
    (["--config={digits}", "--output={out}/cache", "--batch_size=0"], "expected at least 1, found 0"),
    (["--config={digits}", "--output={out}/cache", "--part_size=0"], "--part_size: expected at least 1, found 0"),
    (["--config={digits}", "--output={out}/cache", "--num_processes=2"], "need --coordinator"),
    (["--config={digits}", "--output={out}/cache", "--dtype=int8"], "invalid choice: 'int8'"),
    (["--config={digits}", "--output={out}/cache"], "tokenizers"),
    (["--config={digits}", "--output={files}/empty"], "empty exists already"),
]
TASKS = [
    ([], "--config, --checkpoint, --output"),
    (["--checkpoint=/no"], "--checkpoint: no such file or folder: /no"),
    (["--config=/no.py"], "no such file: /no.py"),
    (["--config={root}/configs/flava.py:tiny"], "config.tasks: expected a tuple of tasks"),
    (["--only=rt"], "--only: no task 'rt'; did you mean 'rte'?"),
    (["--compare=CLIP"], "--compare: no numbers of 'CLIP'"),
    (["--limit=0"], "--limit: expected at least 1, found 0"),
    (["--limit=x"], "--limit"),
    (["--output={files}/names.txt"], "names.txt is no folder"),
    (["--output={files}/names.txt/new"], "names.txt/new"),
    (["--checkpoint={files}/cut"], "params.safetensors"),
    (["--checkpoint={files}/names.txt"], "names.txt"),
    (["--checkpoint={files}/empty"], "expected one weight file"),
    (["--num_processes=2"], "need --coordinator"),
    (["--dry-run"], "--dry-run"),
]
OTHERS = [
    ("checkpoint", [], "command"),
    ("checkpoint", ["verfy", "{files}/model"], "invalid choice: 'verfy'"),
    ("checkpoint", ["verify"], "path"),
    ("checkpoint", ["verify", "/absent"], "/absent: no such file or directory"),
    ("checkpoint", ["verify", "{files}/empty"], "no checkpoint and no vlm_manifest.json in it"),
    ("checkpoint", ["verify", "{files}/run"], "no checkpoint"),
    ("checkpoint", ["verify", "{files}/names.txt"], "names.txt"),
    ("score", [], "TASK"),
    ("score", ["caption", "--results=/no.json", "--annotations=/no.json"], "invalid choice: 'caption'"),
    ("score", ["captions", "--results=/no.json", "--annotations=/no.json"], "/no.json"),
    ("score", ["vqa", "--results={files}/broken.json", "--annotations={files}/broken.json"], "broken.json"),
    ("capfilt", [], "SHARDS"),
    ("capfilt", ["/no.tar", "--captioner=/no", "--filter=/no", "--output={out}/new"], "/no"),
    ("capfilt", ["/no.tar", "--captioner={files}/cut", "--filter={files}/cut", "--output={out}/new"], "/no.tar"),
    ("demo", ["--colour"], "--colour"),
    ("demo", ["--output={files}/names.txt", "--data_only"], "names.txt"),
    ("demo", ["--output=/proc/nowhere", "--data_only"], "/proc/nowhere"),
]

GOOD_TRAIN = ["--config={toy}", "--workdir={out}/run"]
GOOD_CLIP = ["--config={root}/configs/digits.py:clip", "--workdir={out}/run"]
GOOD_BLIP = ["--config={root}/configs/blip.py:tiny,{out}", "--workdir={out}/run"]
GOOD_EVAL = ["--config={files}/eval.json", "--checkpoint={files}/model", "--output={out}/r.json"]
GOOD_TASKS = [
    *("--config={root}/configs/flava_tasks.py", "--checkpoint={files}/model", "--output={out}/tasks", "--data={out}"),
]
CASES = [
    *(("train", *case) for case in TRAIN),
    *(("train", [*GOOD_TRAIN, *arguments], message) for arguments, message in TOY),
    *(("train", [*GOOD_CLIP, *arguments], message) for arguments, message in CLIP),
    *(("train", [*GOOD_BLIP, *arguments], message) for arguments, message in BLIP),
    *(("eval", *case) for case in EVAL),
    *(("eval", [*GOOD_EVAL, *arguments], message) for arguments, message in EVAL_MODEL),
    *(("predict", ["{files}/model", *arguments], message) for arguments, message in PREDICT),
    ("predict", ["/nowhere", "--task=embed", "--text=a"], "no such checkpoint: /nowhere"),
    ("predict", ["{files}/cut", "--task=embed", "--text=a"], "params.safetensors"),
    *(("load", [path], message) for path, message in LOAD),
    *(("load", *case) for case in LOAD_OPTIONS),
    *(("convert", *case) for case in CONVERT),
    *(("precompute", *case) for case in PRECOMPUTE),
    ("tasks", *TASKS[0]),
    *(("tasks", [*GOOD_TASKS, *arguments], message) for arguments, message in TASKS[1:]),
    *OTHERS,
]


def _fill(arguments, files, out):
    toy, digits = f"{ROOT}/tests/train_toy/config.py:{files}/toy.jsonl", f"{ROOT}/configs/digits.py:teacher,{out}"
    return [a.format(files=files, out=out, root=ROOT, toy=toy, digits=digits) for a in arguments]


def _judge(status, out, err, message):
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert message.format() in err, err


def _names(command, arguments, message):
    return f"{command} {' '.join(arguments)}"


@pytest.mark.parametrize(("command", "arguments", "message"), CASES, ids=[_names(*case) for case in CASES])
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    command, arguments, message, files, tmp_path, capsys, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT))
    FAMILIES.pop("toy", None)  # a program that an earlier case ran has added it
    before = sorted(files.rglob("*"))
    status = 0
    try:
        status = _main(command)(_fill(arguments, files, tmp_path)) or 0
    except SystemExit as error:
        status = error.code
    _judge(status, *capsys.readouterr(), message)
    assert list(tmp_path.iterdir()) == [] and sorted(files.rglob("*")) == before


def test_the_list_is_long():
    assert len(CASES) >= 100 and len({_names(*case) for case in CASES}) == len(CASES)
    assert {case[0] for case in CASES} == {
        *(
            "train",
            "eval",
            "predict",
            "load",
            "convert",
            "precompute",
            "tasks",
            "score",
            "capfilt",
            "checkpoint",
            "demo",
        )
    }


def test_the_files_are_good_where_they_should_be(files, capsys):
    """Otherwise a case could fail for another reason than its own."""
    vlm.load(files / "model")
    with contextlib.redirect_stdout(io.StringIO()):
        assert importlib.import_module("vlm.checkpoint.__main__").main(["verify", str(files / "model")]) == 0


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (["train.py"], ["--config={toy}", "--workdir={out}/run", "--config.loss.scale=x"], "config.loss.scale"),
        (["eval.py"], ["--checkpoint=/nowhere"], "/nowhere"),
        (["-m", "vlm.convert"], ["{files}/code.pt", "{out}/new"], "code.pt"),
        (["-m", "vlm.predict"], ["{files}/model", "--task=embed", "--image={files}/bomb.png"], "bomb.png"),
        (["-m", "vlm.checkpoint"], ["verify", "/absent"], "/absent"),
        (["-m", "vlm.demo"], ["--colour"], "--colour"),
    ],
)
def test_in_a_process_of_its_own(program, arguments, message, files, tmp_path):
    command = [sys.executable, *program, *_fill(arguments, files, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    _judge(done.returncode, done.stdout, done.stderr, message)
    assert list(tmp_path.iterdir()) == []
