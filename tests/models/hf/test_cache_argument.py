"""Under which name a class of transformers takes its cache: one that it does not know would be dropped in silence."""

from typing import Any

import pytest
import transformers

from quasar_core.errors import QuasarError
from quasar_core.models.hf.cache import cache_argument


class Newest:
    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> None: ...


class Older:
    def forward(self, input_ids: Any, cache_params: Any = None, **kwargs: Any) -> None: ...


class Without:
    def forward(self, input_ids: Any, **kwargs: Any) -> None: ...


def test_a_class_is_given_its_cache_by_its_own_name() -> None:
    assert cache_argument(Newest) == "cache"
    assert cache_argument(Older) == "cache_params"
    assert cache_argument(transformers.LlamaForCausalLM) in ("past_key_values", "cache")  # as from transformers 5.24
    with pytest.raises(QuasarError, match="Without takes no cache"):
        cache_argument(Without)
