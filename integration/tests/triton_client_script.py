"""Run in an environment of its own, which has tritonclient, with ADDRESS CA TOKEN."""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

SAMPLING = {"temperature": 1.0, "seed": 11, "max_tokens": 20, "ignore_eos": True}


def inputs(text, stream, sampling=SAMPLING, **switches):
    made = []
    for name, value in (("text_input", text), ("sampling_parameters", json.dumps(sampling))):
        tensor = triton.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value.encode()], dtype=np.object_))
        made.append(tensor)
    for name, value in {"stream": stream, **switches}.items():
        tensor = triton.InferInput(name, [1], "BOOL")
        tensor.set_data_from_numpy(np.array([value], dtype=bool))
        made.append(tensor)
    return made


def describe(client, headers):
    assert client.is_server_live(headers=headers)
    assert client.is_server_ready(headers=headers)
    assert client.is_model_ready("mini", headers=headers)
    assert not client.is_model_ready("other", headers=headers)
    assert client.get_server_metadata(headers=headers).name == "kvmesh"
    names = [t.name for t in client.get_model_metadata("mini", headers=headers).inputs]
    assert "text_input" in names
    config = client.get_model_config("mini", headers=headers).config
    assert config.model_transaction_policy.decoupled
    types = {tensor.name: tensor.data_type for tensor in config.input}
    assert types["text_input"] == 13 and config.parameters["max_context"].string_value


def whole(client, headers):
    result = client.infer(
        "mini",
        inputs("The old", False, exclude_input_in_output=True, return_num_output_tokens=True),
        request_id="one",
        headers=headers,
        client_timeout=60,
    )
    assert result.as_numpy("finish_reason")[0] == b"length"
    assert list(result.as_numpy("num_output_tokens")) == [20]
    assert result.get_response().id == "one"
    return result.as_numpy("text_output")[0].decode()


def streamed(client, headers, said):
    found = queue.Queue()
    client.start_stream(lambda result, error: found.put((result, error)), headers=headers)
    client.async_stream_infer(
        "mini", inputs("The old", True), request_id="two", enable_empty_final_response=True
    )
    texts = []
    while True:
        result, error = found.get(timeout=60)
        assert error is None, error
        response = result.get_response()
        assert response.id == "two"
        texts.append(result.as_numpy("text_output")[0].decode())
        if response.parameters["triton_final_response"].bool_param:
            break
    assert "".join(texts) == said and len(texts) > 1
    client.async_stream_infer("mini", inputs("The old", True, {"temperature": -1}))
    result, error = found.get(timeout=60)
    assert result is None and "temperature" in error.message()
    client.stop_stream()


def errors(client, headers):
    try:
        client.is_server_live()
    except InferenceServerException as error:
        assert error.status() == "StatusCode.UNAUTHENTICATED", error
    else:
        raise AssertionError("it answered without a token")
    for model, sampling, status in (
        ("mini", {"top_p": 3}, "StatusCode.INVALID_ARGUMENT"),
        ("other", {}, "StatusCode.NOT_FOUND"),
    ):
        try:
            client.infer(model, inputs("x", False, sampling), headers=headers)
        except InferenceServerException as error:
            assert error.status() == status, error
        else:
            raise AssertionError("it was not refused")
    try:
        long = {"max_tokens": 7000, "ignore_eos": True}
        client.infer("mini", inputs("x", False, long), headers=headers, client_timeout=0.3)
    except InferenceServerException as error:
        assert error.status() == "StatusCode.DEADLINE_EXCEEDED", error
    else:
        raise AssertionError("its deadline did not end it")


def main():
    address, ca, token = sys.argv[1:]
    headers = {"authorization": f"Bearer {token}"}
    client = triton.InferenceServerClient(address, ssl=True, root_certificates=ca)
    describe(client, headers)
    streamed(client, headers, whole(client, headers))
    errors(client, headers)
    client.close()


if __name__ == "__main__":
    main()
