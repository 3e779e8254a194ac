"""FLAVA (Singh et al. 2022, arXiv 2112.04482): an image, a text and a fusion encoder that work alone and together."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm.encoders.bert import Bert
from vlm.encoders.dvae import DVAEEncoder
from vlm.encoders.output import EncoderOutput
from vlm.encoders.vit import ViT
from vlm.fusion.multimodal import FusionEncoder
from vlm.layers.arrays import AnyArray, exact
from vlm.layers.linear import Linear, param
from vlm.layers.lm_head import LMHead
from vlm.layers.mlp import ACTIVATIONS
from vlm.layers.norms import normalise
from vlm.layers.transformer import first_tokens
from vlm.models.flava.config import ClassifierConfig, FLAVAConfig
from vlm.models.flava.output import FLAVAOutput

Image = Float[AnyArray, "b h w c"]
Tokens = Int[AnyArray, "b l"]
Mask = Bool[AnyArray, "b l"] | None
PatchMask = Bool[AnyArray, "b p"] | Bool[AnyArray, "b i j"] | None


class MatchingHead(nn.Module):
    """tanh(Linear(first token)), then scores of mismatch (0) and match (1)."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, hidden: Float[AnyArray, "b n e"]) -> Float[Array, "b 2"]:
        linear = partial(Linear, axes=("embed", "projection"), dtype=jnp.dtype(self.dtype))
        return linear(2, name="out")(jnp.tanh(linear(hidden.shape[-1], name="pooler")(hidden[:, 0])))


class Classifier(nn.Module):
    """Linear, activation, dropout, Linear."""

    config: ClassifierConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, hidden: Float[AnyArray, "b e"], *, deterministic: bool = True) -> Float[Array, "b k"]:
        config, linear = self.config, partial(Linear, axes=("embed", "projection"), dtype=jnp.dtype(self.dtype))
        hidden = ACTIVATIONS[config.activation](linear(config.hidden_size, name="dense")(hidden))
        hidden = nn.Dropout(config.dropout_rate, deterministic=deterministic)(hidden)
        return linear(config.num_labels, name="out")(hidden)


class FLAVA(nn.Module):
    """Three encoders, the projections between them, and the heads that a config asks for."""

    config: FLAVAConfig

    def setup(self) -> None:
        config = self.config
        vision, text, fusion = config.vision, config.text, config.fusion
        linear = partial(Linear, axes=("embed", "projection"))
        if vision is not None:
            self.vision = ViT(vision)
        if text is not None:
            self.text = Bert(text)
        if fusion is not None:
            self.fusion = FusionEncoder(fusion)
        for name, tower in (("vision", vision), ("text", text)):
            if tower is None:
                continue
            dtype = jnp.dtype(tower.dtype)
            if config.projection_dim is not None:
                setattr(self, f"{name}_projection", linear(config.projection_dim, dtype=dtype))
            if fusion is not None:
                setattr(self, f"{name}_to_fusion", linear(fusion.hidden_size, dtype=dtype))
        if config.projection_dim is not None and vision is not None and text is not None:
            self.logit_scale = param(self, "logit_scale", nn.initializers.constant(config.logit_scale_init), (), ())
        if config.heads:
            self._setup_heads()
        if config.codebook is not None:
            self.codebook = DVAEEncoder(config.codebook)
        if config.classifier is not None:
            tower = {"image": vision, "text": text, "multimodal": fusion}[config.classifier.input]
            assert tower is not None
            self.classifier = Classifier(config.classifier, tower.dtype)

    def _setup_heads(self) -> None:
        config = self.config
        for unimodal, multimodal, tower, size in (
            ("mim", "mmm_image", config.vision, config.image_vocab_size),
            ("mlm", "mmm_text", config.text, config.text.vocab_size if config.text else 0),
        ):
            if tower is not None:
                eps = tower.norm_eps if config.head_norm_eps is None else config.head_norm_eps
                head = partial(LMHead, size, eps, tower.activation, tied=False, dtype=tower.dtype)
                setattr(self, f"{unimodal}_head", head())
                if config.fusion is not None:
                    setattr(self, f"{multimodal}_head", head())
        if config.fusion is not None:
            self.itm_head = MatchingHead(config.fusion.dtype)

    def __call__(
        self,
        image: Image | None = None,
        tokens: Tokens | None = None,
        mask: Mask = None,
        *,
        token_types: Tokens | None = None,
        positions: Tokens | None = None,
        image_mask: Bool[AnyArray, "b n"] | None = None,
        patch_mask: PatchMask = None,
        masked_tokens: Tokens | None = None,
        fuse: bool = True,
        interpolate_positions: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> FLAVAOutput:
        """Encodes images, texts or pairs; with masked inputs, those as well, with what the heads predict.

        Args:
          image: normalised pixels; mask: true at real tokens.
          image_mask: true at the image tokens [B, 1 + P] that others may attend to, in all encoders.
          patch_mask: true at the patches that the masked image hides, row by row or as their grid; masked_tokens: the
            text with tokens hidden. If one of the two is missing for a pair, its modality is unmasked.
          fuse: False skips the fusion of the unmasked inputs.
          interpolate_positions: accept images of another size than the configured one.
        """
        if self.is_initializing():
            self._init_parts()
        flags: dict[str, Any] = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        flags["deterministic"] = deterministic
        vision = {"image_mask": image_mask, "interpolate_positions": interpolate_positions, **flags}
        text = {"token_types": token_types, "positions": positions, **flags}
        whole: dict[str, Any] = {}
        if image is not None:
            whole["image"] = self.encode_image_states(image, **vision)
        if tokens is not None:
            whole["text"] = self.encode_text_states(tokens, mask, **text)
        found = self._compare(**whole)
        if fuse and len(whole) == 2 and self.config.fusion is not None:
            whole["multimodal"] = self.encode_multimodal(**whole, mask=mask, image_mask=image_mask, **flags)
        masked: dict[str, Any] = {}
        if patch_mask is not None or masked_tokens is not None:
            if image is not None:
                masked["image"] = self.encode_image_states(image, patch_mask, **vision)
            hidden_text = tokens if masked_tokens is None else masked_tokens
            if hidden_text is not None:
                masked["text"] = self.encode_text_states(hidden_text, mask, **text)
            if len(masked) == 2 and self.config.fusion is not None:
                masked["multimodal"] = self.encode_multimodal(**masked, mask=mask, image_mask=image_mask, **flags)
            if self.config.heads:
                found |= self._predict(**{name: output.last_hidden_state for name, output in masked.items()})
        for kind, outputs in (("", whole), ("_masked", masked)):
            for name, output in outputs.items():
                found |= {f"{name}{kind}_embeddings": output.last_hidden_state, f"{name}{kind}_output": output}
        return FLAVAOutput(**found)

    def encode_image_states(
        self,
        image: Image,
        patch_mask: PatchMask = None,
        *,
        image_mask: Bool[AnyArray, "b n"] | None = None,
        interpolate_positions: bool = False,
        deterministic: bool = True,
        **outputs: Any,
    ) -> EncoderOutput:
        """States [B, 1 + P, E] of images, of which `patch_mask` hides patches; `outputs` as of `ViT`."""
        flags: dict[str, Any] = {"interpolate_positions": interpolate_positions, "deterministic": deterministic}
        if patch_mask is not None:
            patch_mask = patch_mask.reshape(len(patch_mask), -1)
        return self.vision(image, patch_mask=patch_mask, mask=image_mask, **flags, **outputs)

    def encode_text_states(
        self,
        tokens: Tokens,
        mask: Mask = None,
        *,
        token_types: Tokens | None = None,
        positions: Tokens | None = None,
        deterministic: bool = True,
        **outputs: Any,
    ) -> EncoderOutput:
        """States [B, L, E] of texts; `outputs` as of `Bert`."""
        flags: dict[str, Any] = {"deterministic": deterministic, **outputs}
        return self.text(tokens, mask, token_types=token_types, positions=positions, **flags)

    def encode_multimodal(
        self,
        image: EncoderOutput,
        text: EncoderOutput,
        mask: Mask = None,
        *,
        image_mask: Bool[AnyArray, "b n"] | None = None,
        deterministic: bool = True,
        **outputs: Any,
    ) -> EncoderOutput:
        """States of pairs: class token, image and text tokens. Reads the encoders' states before their last norm."""
        states = self.vision_to_fusion(image.pre_norm_state), self.text_to_fusion(text.pre_norm_state)
        keys = None
        if image_mask is not None or (mask is not None and self.config.mask_text_padding):
            keys = [jnp.ones(x.shape[:2], bool) for x in states]
            keys[0] = keys[0] if image_mask is None else jnp.asarray(image_mask)
            keys[1] = keys[1] if mask is None or not self.config.mask_text_padding else jnp.asarray(mask)
            keys = jnp.concatenate(keys, axis=1)
        flags: dict[str, Any] = {"deterministic": deterministic, **outputs}
        return self.fusion(jnp.concatenate(states, axis=1), keys, **flags)

    def encode_image(
        self, image: Image, *, interpolate_positions: bool = False, deterministic: bool = True
    ) -> Float[Array, "b p"]:
        """Image embeddings in the joint space, not normalised."""
        flags: dict[str, Any] = {"interpolate_positions": interpolate_positions, "deterministic": deterministic}
        return self.project("vision", self.encode_image_states(image, outputs_at=first_tokens(image), **flags))

    def encode_text(
        self,
        tokens: Tokens,
        mask: Mask = None,
        *,
        token_types: Tokens | None = None,
        positions: Tokens | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b p"]:
        """Text embeddings in the joint space, not normalised."""
        given: dict[str, Any] = {"token_types": token_types, "positions": positions, "deterministic": deterministic}
        return self.project("text", self.encode_text_states(tokens, mask, outputs_at=first_tokens(tokens), **given))

    def project(self, tower: str, output: EncoderOutput) -> Float[Array, "b p"]:
        """The class token of "vision" or "text" in the joint space, not normalised."""
        return getattr(self, f"{tower}_projection")(output.last_hidden_state[:, 0])

    def match(
        self,
        image: Image,
        tokens: Tokens,
        mask: Mask = None,
        *,
        token_types: Tokens | None = None,
        interpolate_positions: bool = False,
        **inputs: Any,
    ) -> Float[Array, "b 2"]:
        """Matching logits of unmasked pairs; index 1: they belong together. Inputs as of `encode`."""
        inputs |= {"token_types": token_types, "interpolate_positions": interpolate_positions, "first_only": True}
        return self.itm_head(self.encode("multimodal", image, tokens, mask, **inputs).last_hidden_state)

    def classify(
        self,
        image: Image | None = None,
        tokens: Tokens | None = None,
        mask: Mask = None,
        *,
        token_types: Tokens | None = None,
        interpolate_positions: bool = False,
        deterministic: bool = True,
        **inputs: Any,
    ) -> Float[Array, "b k"]:
        """Scores of the classes (or the values) that the classifier was made for; inputs as of `encode`."""
        assert self.config.classifier is not None
        inputs |= {"token_types": token_types, "interpolate_positions": interpolate_positions}
        inputs |= {"deterministic": deterministic, "first_only": True}
        output = self.encode(self.config.classifier.input, image, tokens, mask, **inputs)
        return self.classifier(output.last_hidden_state[:, 0], deterministic=deterministic)

    def encode(
        self,
        kind: str,
        image: Image | None = None,
        tokens: Tokens | None = None,
        mask: Mask = None,
        *,
        token_types: Tokens | None = None,
        positions: Tokens | None = None,
        image_mask: Bool[AnyArray, "b n"] | None = None,
        interpolate_positions: bool = False,
        deterministic: bool = True,
        first_only: bool = False,
    ) -> EncoderOutput:
        """What the "image", "text" or "multimodal" encoder makes of unmasked inputs; see `__call__`.

        With `first_only`, the first of its tokens alone.

        Raises:
          ValueError: an input that it reads is missing.
        """
        if kind != "text" and image is None:
            raise ValueError(f"expected an image for {kind} input, found none")
        if kind != "image" and tokens is None:
            raise ValueError(f"expected tokens for {kind} input, found none")
        of_image = {"image_mask": image_mask, "interpolate_positions": interpolate_positions}
        of_text = {"token_types": token_types, "positions": positions}
        flags: dict[str, Any] = {"image": of_image, "text": of_text, "multimodal": {"image_mask": image_mask}}
        for name in flags:
            flags[name]["deterministic"] = deterministic
        if first_only:
            flags[kind]["outputs_at"] = first_tokens(tokens if kind == "text" else image)  # pyright: ignore
        outputs: dict[str, Any] = {}
        if image is not None and kind != "text":
            outputs["image"] = self.encode_image_states(image, **flags["image"])
        if tokens is not None and kind != "image":
            outputs["text"] = self.encode_text_states(tokens, mask, **flags["text"])
        if kind == "multimodal":
            outputs[kind] = self.encode_multimodal(**outputs, mask=mask, **flags[kind])
        return outputs[kind]

    def codebook_logits(self, image: Image) -> Float[Array, "b i j v"]:
        """Scores of every visual word for every cell of the codebook's picture, whose values are in [0.1, 0.9]."""
        return self.codebook(image)

    def codebook_probabilities(self, image: Image) -> Float[Array, "b i j v"]:
        """The same as probabilities over the visual words."""
        return nn.softmax(self.codebook(image))

    def codebook_labels(
        self, image: Image, positions: Int[AnyArray, "b k"] | None = None
    ) -> Int[Array, "b p"] | Int[Array, "b k"]:
        """The visual word of every patch, or of those at `positions` only."""
        features = self.codebook.features(image)
        features = features.reshape(len(features), -1, features.shape[-1])
        if positions is not None:
            features = jnp.take_along_axis(features, positions[:, :, None], axis=1)
        return self.codebook.words(features)

    def predict_masked(self, head: str, hidden: Float[AnyArray, "*b e"]) -> Float[Array, "*b v"]:
        """Scores of words or visual words by one of the heads "mim", "mlm", "mmm_image" and "mmm_text"."""
        return getattr(self, f"{head}_head")(hidden)

    def predict_match(self, hidden: Float[AnyArray, "b n e"]) -> Float[Array, "b 2"]:
        """Matching logits of the fusion encoder's states."""
        return self.itm_head(hidden)

    def _compare(self, image: EncoderOutput | None = None, text: EncoderOutput | None = None) -> dict[str, Any]:
        if image is None or text is None or self.config.projection_dim is None:
            return {}
        pair = normalise(self.project("vision", image)), normalise(self.project("text", text))
        logits = jnp.exp(self.logit_scale) * jnp.dot(pair[0], pair[1].T, precision=exact(pair[0]))
        return {"contrastive_logits_per_image": logits, "contrastive_logits_per_text": logits.T}

    def _predict(self, image: Any = None, text: Any = None, multimodal: Any = None) -> dict[str, Any]:
        """What the heads say of masked inputs."""
        if multimodal is None:
            found = {} if image is None else {"mim_logits": self.mim_head(image)}
            return found if text is None else found | {"mlm_logits": self.mlm_head(text)}
        patches, words = self.split(multimodal, text.shape[1])
        return {
            "itm_logits": self.itm_head(multimodal),
            "mmm_image_logits": self.mmm_image_head(patches),
            "mmm_text_logits": self.mmm_text_head(words),
        }

    def split(self, hidden: Float[AnyArray, "b n e"], length: int) -> tuple[Any, Any]:
        """The fusion encoder's states of the patches [B, P, E] and of the text's `length` tokens [B, L, E]."""
        return hidden[:, self.first_patch : -length], hidden[:, -length:]

    @property
    def first_patch(self) -> int:
        """The position of the first patch among the fusion encoder's tokens; the last is followed by the text."""
        assert self.config.fusion is not None
        return 2 if self.config.fusion.class_token else 1

    def _init_parts(self) -> None:
        """Creates the parameters of parts that a forward pass need not use."""
        config, hidden = self.config, {}
        if config.vision is not None:
            image = jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3))
            hidden["vision"] = self.vision(image).last_hidden_state
        if config.text is not None:
            hidden["text"] = self.text(jnp.zeros((1, 2), jnp.int32)).last_hidden_state
        for tower, states in hidden.items():
            for part in ("projection", "to_fusion"):
                if hasattr(self, f"{tower}_{part}"):
                    getattr(self, f"{tower}_{part}")(states)
        if config.fusion is not None:
            hidden["fusion"] = self.fusion(jnp.zeros((1, 2, config.fusion.hidden_size))).last_hidden_state
        inputs = {"mim": "vision", "mlm": "text", "mmm_image": "fusion", "mmm_text": "fusion", "itm": "fusion"}
        for name, tower in inputs.items():
            if hasattr(self, f"{name}_head"):
                getattr(self, f"{name}_head")(hidden[tower])
        if config.classifier is not None:
            tower = {"image": "vision", "text": "text", "multimodal": "fusion"}[config.classifier.input]
            self.classifier(hidden[tower][:, 0])
        if config.codebook is not None:
            side = config.codebook.downsampling
            self.codebook(jnp.zeros((1, side, side, config.codebook.input_channels)))
