"""Policies: causal language models as pure functions (`base.Policy`)."""

from jentropy.policy.transformer import LAPTOP as LAPTOP
from jentropy.policy.transformer import Cache as Cache
from jentropy.policy.transformer import TransformerConfig as TransformerConfig
from jentropy.policy.transformer import transformer as transformer
