import math

import pytest
from pydantic import ValidationError

from sparse_backend.activation import Activation
from sparse_backend.errors import UserError


@pytest.mark.parametrize(
    ("config", "kind", "threshold"),
    [
        ({"hidden_act": "relu"}, "relu", 0.0),
        ({"hidden_act": "relu", "hidden_act_param": 0.5}, "relu", 0.0),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.01}, "fatrelu", 0.01),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0}, "fatrelu", 0.0),
        ({"hidden_act": "fatrelu", "hidden_act_param": 3.4e38}, "fatrelu", 3.4e38),
    ],
)
def test_reads_what_hugging_face_configs_say(config: dict[str, object], kind: str, threshold: float) -> None:
    activation = Activation.from_hf_config(config)
    assert (activation.kind, activation.threshold) == (kind, threshold)


@pytest.mark.parametrize("activation", [Activation(kind="relu"), Activation(kind="fatrelu", threshold=0.03)])
def test_config_fields_round_trip(activation: Activation) -> None:
    assert Activation.from_hf_config(activation.to_hf_config()) == activation


@pytest.mark.parametrize("threshold", [math.nan, math.inf, 1e39, 10**400, -0.01, None, "0.01", True])
def test_unusable_threshold_is_refused_with_its_value(threshold: object) -> None:
    with pytest.raises(UserError, match="hidden_act_param") as caught:
        Activation.from_hf_config({"hidden_act": "fatrelu", "hidden_act_param": threshold})
    assert str(threshold) in str(caught.value)


@pytest.mark.parametrize("threshold", [math.nan, math.inf, 1e39, -0.01])
def test_no_activation_has_an_unusable_threshold(threshold: float) -> None:
    with pytest.raises(ValidationError, match="threshold"):
        Activation(kind="fatrelu", threshold=threshold)


@pytest.mark.parametrize(("name", "called"), [("silu", "Swish"), ("gelu_pytorch_tanh", "GELU")])
def test_dense_activation_is_refused_with_its_name_and_the_way_out(name: str, called: str) -> None:
    with pytest.raises(UserError) as caught:
        Activation.from_hf_config({"hidden_act": name})
    assert called in str(caught.value)
    assert "prosparse sparsify" in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"hidden_act": "relu6"}, {"hidden_act": ["relu"]}, {"hidden_act": None}])
def test_unknown_activation_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(UserError, match="hidden_act is"):
        Activation.from_hf_config(config)
