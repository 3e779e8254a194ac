"""The evaluations of BLIP's published results, beside those of `configs/blip.py` the zero-shot ones of videos.

    python -m vlm.convert model_base_retrieval_coco.pth checkpoints/video --override=video=concatenate
    python eval.py --config=configs/blip_evaluations.py:msrvtt --checkpoint=checkpoints/video
    python -m vlm.convert model_base_vqa_capfilt_large.pth checkpoints/video_vqa --override=video=concatenate
    python eval.py --config=configs/blip_evaluations.py:msrvtt_qa --checkpoint=checkpoints/video_vqa

Videos are folders of frames, data/msrvtt/frames/video7020/0001.jpg and so on, of which 8 (questions: 16), evenly
spaced, are read. Any other variant is a task of `configs/blip.py` (`caption`, `dialog`, …).

| variant     | model                              | expected (paper, tables 10 and 11, zero-shot)              |
|-------------|------------------------------------|------------------------------------------------------------|
| `msrvtt`    | retrieval, fine-tuned on COCO      | video of a text: R@1 43.3, R@5 65.6, R@10 74.7, median 2   |
| `msrvtt_qa` | question answering, fine-tuned     | accuracy 19.2                                              |
"""

from ml_collections import ConfigDict


def get_config(variant: str = "msrvtt") -> ConfigDict:
    """Returns a configuration that evaluates and cannot train."""
    if variant not in EVALUATIONS:
        raise ValueError(f"unknown variant {variant!r}; choose from {', '.join(EVALUATIONS)}")
    return ConfigDict({"family": "blip", "eval": EVALUATIONS[variant]})


SNLI_VE = {  # as published: {"Flickr30K_ID": …, "gold_label": …, "sentence1": …, "sentence2": …} on every line
    "kind": "jsonl",
    "root": "data/flickr30k/flickr30k_images",
    "fields": {"image": "{Flickr30K_ID}.jpg", "text": "sentence2", "label": "gold_label"},
    "classes": {"label": ("contradiction", "neutral", "entailment")},  # LAVIS' numbers of them
}


def _retrieval(path: str, shortlist: int) -> dict:
    """Published: both lists re-ranked down to `shortlist`; scores are matching logit plus cosine."""
    data = {"kind": "json", "path": path}
    return {"kind": "matching_retrieval", "data": data, "text": "caption", "shortlist": shortlist}


EVALUATIONS = {  # what the paper reports; the expected numbers stand in the table on top
    "retrieval_coco": {"coco": _retrieval("data/coco/coco_karpathy_test.json", 256)},
    "retrieval_flickr": {"flickr": _retrieval("data/flickr30k/flickr30k_test.json", 128)},
    "caption": {
        "coco": {"kind": "captions", "data": {"kind": "json", "path": "data/coco/coco_karpathy_test.json"}},
        # captions are not scored here: the file that is written goes to NoCaps' server, or to `python -m vlm.score`
        "nocaps": {
            "kind": "captions",
            "data": {"kind": "json", "path": "data/nocaps/nocaps_val.json"},
            "captions": None,
            "preset": "nocaps",
        },
    },
    "vqa": {  # the answers to test questions are known to the server alone
        "vqa": {
            "kind": "vqa",
            "data": {"kind": "json", "path": "data/vqa/vqa_test.json"},
            "answers": None,
            "mode": "rank",
            "answer_list": "data/vqa/answer_list.json",
        }
    },
    "nlvr": {
        part: {"kind": "nlvr2", "data": {"kind": "json", "path": f"data/nlvr2/nlvr_{part}.json"}}
        for part in ("dev", "test")
    },
    "classification": {
        part: {
            "kind": "classification",
            "data": {**SNLI_VE, "path": f"data/snli_ve/snli_ve_{part}.jsonl"},
            "names": SNLI_VE["classes"]["label"],
        }
        for part in ("dev", "test")
    },
    "dialog": {  # NDCG is of the rounds that the dense annotations judge
        "visdial": {
            "kind": "visual_dialog",
            "data": {
                "kind": "visdial",
                "path": "data/visdial/visdial_1.0_val.json",
                "annotations": "data/visdial/visdial_1.0_val_dense_annotations.json",
            },
            "batch_size": 16,
        }
    },
    "msrvtt": {  # the 1,000 test clips, a caption each
        "videos": {
            **_retrieval("data/msrvtt/msrvtt_test.jsonl", 128),
            "data": {
                "kind": "jsonl",
                "path": "data/msrvtt/msrvtt_test.jsonl",
                "fields": {"image": "clip_name", "caption": "caption"},
                "root": "data/msrvtt/frames",
                "frames": 8,
            },
        }
    },
    "msrvtt_qa": {
        "videos": {
            "kind": "vqa",
            "data": {
                "kind": "json",
                "path": "data/msrvtt/test_qa.json",
                "fields": {"image": "video", "question": "question", "answer": "answer"},
                "root": "data/msrvtt/frames",
                "frames": 16,
            },
            "mode": "rank",
            "answer_list": "data/msrvtt/answer_list.json",
            "batch_size": 8,
        }
    },
}
