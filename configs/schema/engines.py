"""The SGLang servers of a run: those of the policy, and those of frozen models beside it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from polyturn.configs.schema.section import Section

Port = Annotated[int, Field(ge=0, le=65535)]
URL = re.compile(r"https?://[^/\s?#]+/?$")
GroupName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class RouterConfig(Section):
    """How requests are spread over the engines."""

    policy: Literal["sticky", "least_loaded", "cache_aware", "round_robin", "random", "power_of_two"] = (
        "sticky"
    )
    """sticky: an episode stays on one engine, which has its KV, unless that is overloaded or gone; least_loaded: each
    request goes where the fewest are under way. Both ask the engines themselves; the others are policies of
    sglang-router, which then stands in front."""
    overload_ratio: Annotated[float, Field(ge=1)] = 1.5
    """sticky: an episode leaves an engine that has more requests under way than so many times the fewest of any ..."""
    overload_margin: PositiveInt = 16
    """... and this many beside."""
    host: str = "127.0.0.1"
    """The address that sglang-router listens on, or a name of this machine's."""
    port: Port = 0
    """Of sglang-router; 0 picks a free port."""
    options: dict[str, Any] = {}
    """Further arguments of sglang-router, checked against the installed package's own; for its policies alone."""

    @property
    def is_sglangs(self) -> bool:
        """Whether the policy is one of sglang-router's."""
        return self.policy not in ("sticky", "least_loaded")

    @model_validator(mode="after")
    def _options_are_of_a_router(self) -> Self:
        if self.options and not self.is_sglangs:
            raise ValueError(
                f"options are sglang-router's, which policy {self.policy} does without; choose one of its policies, "
                "such as cache_aware"
            )
        return self


class ServersConfig(Section):
    """SGLang servers that serve one model."""

    num_engines: PositiveInt = 1
    """SGLang servers, each with a full copy of the weights."""
    tensor_parallel: PositiveInt = 1
    """Ranks that share one engine's weights."""
    ranks_per_node: PositiveInt | None = None
    """Ranks of one engine on a node; null: on GPUs as many as a node has GPUs for and that divide `tensor_parallel`, on
    a CPU all. An engine with more ranks than that stands on several nodes (docs/cluster.md)."""
    device: Literal["cpu", "cuda"] = "cuda"
    """What the engines run on."""
    host: str | None = None
    """The address that the engines listen on, each on its host; null: loopback, or in a Ray cluster that was joined the
    address by which its node is known. Others are told the node's address in place of 0.0.0.0 and ::."""
    port: Port = 0
    """The first engine's port; the others follow. 0 picks free ports."""
    start_timeout_s: PositiveFloat = 600.0
    """The run fails when an engine is not ready by then."""

    @model_validator(mode="after")
    def _nodes_of_an_engine_are_alike(self) -> Self:
        if self.ranks_per_node is not None and self.tensor_parallel % self.ranks_per_node:
            raise ValueError(
                f"ranks_per_node is {self.ranks_per_node}, which must divide tensor_parallel={self.tensor_parallel}: "
                "an engine has as many ranks on each of its nodes"
            )
        return self

    @property
    def num_gpus(self) -> int:
        """GPUs of all of them."""
        return self.num_engines * self.tensor_parallel if self.device == "cuda" else 0


class ReplaceConfig(Section):
    """What becomes of an engine that fails while a run goes on (docs/recovery.md)."""

    attempts: NonNegativeInt = 3
    """So many starts in a row may fail before an engine is given up, and the run goes on without it; 0: it is given up
    at once."""
    first_wait_s: PositiveFloat = 1.0
    """Before the second of these starts; each further wait is twice as long."""
    hung_after_s: PositiveFloat = 60.0
    """An engine that answers nothing for so long is ended and replaced. While it takes new weights by broadcast nothing
    else can be asked: there it counts once an update has gone through, or ten times the longest answer of it if that is
    more; before, and by other ways, weight_sync.timeout_s does."""
    faults_in_a_row: PositiveInt = 16
    """So is one that failed so many requests in a row, or answered them with what makes no sense."""
    deaths_per_hour: PositiveInt | None = 20
    """The run ends when more engines were lost within an hour; null: no limit."""


class EnginesConfig(ServersConfig):
    """The SGLang servers."""

    placement: Literal["own", "shared"] = "own"
    """own: on GPUs of their own; shared: on the trainer's GPUs, by turns: whoever has nothing to do gives its memory up
    (docs/colocated.md)."""
    turn_timeout_s: PositiveFloat = 600.0
    """Where trainer and engines take turns: the run fails, and says whom it waited for, when an engine or a rank has
    not given its memory up, or taken it back, by then."""
    num_on_trainer_gpus: NonNegativeInt = 0
    """With `placement: own`, so many of the engines, the last ones, are on the trainer's GPUs all the same, by turns:
    idle GPUs of the trainer are lent to rollout."""
    urls: list[str] = []
    """Servers of the policy that others started, such as http://10.0.0.1:30000: the run starts none, sends them
    weights, and leaves them running. `num_engines` is their number then, whatever it says; `tensor_parallel` must be
    theirs."""

    updates: Literal["pushed", "external"] = "pushed"
    """Who gives new weights to the servers of `urls`: the run; or whoever serves them (external), from the directories
    that `weight_sync.kind: disk` writes. Then only those are asked that say that they serve the newest version."""
    request_timeout_s: PositiveFloat = 300.0
    """A generation request without an answer fails after so many seconds, retries included, and its episode is played
    again; less than `environment.episode_timeout_s`."""
    routing_replay: bool = False
    """Record the experts that each token was sent to, and replay them in the trainer (models with experts)."""
    router: RouterConfig = RouterConfig()
    replace: ReplaceConfig = ReplaceConfig()
    num_prefill: NonNegativeInt = 0
    """So many of the engines, the first ones, only read prompts and hand their KV to the others, which only generate
    (prefill/decode disaggregation, docs/cluster.md); sglang-router pairs them. 0: every engine does both."""

    @model_validator(mode="before")
    @classmethod
    def _count_the_urls(cls, data: Any) -> Any:
        urls = data.get("urls") if isinstance(data, dict) else None
        return {**data, "num_engines": len(urls)} if isinstance(urls, list) and urls else data

    @model_validator(mode="after")
    def _stands_in_one_place(self) -> Self:
        for url in self.urls:
            if self.urls.count(url) > 1:
                raise ValueError(f"urls names {url!r} twice")
            if not URL.match(url):
                raise ValueError(f"urls: {url!r} is not like http://host:port")
        if self.urls and (self.placement == "shared" or self.num_on_trainer_gpus):
            raise ValueError(
                "urls names engines that others placed; leave placement and num_on_trainer_gpus out"
            )
        if self.updates == "external" and not self.urls:
            raise ValueError("updates: external is for servers that others started; name them in urls")
        if self.placement == "shared" and self.num_on_trainer_gpus:
            raise ValueError(
                "placement: shared has all engines on the trainer's GPUs; leave num_on_trainer_gpus out"
            )
        if self.num_on_trainer_gpus > self.num_engines:
            raise ValueError(
                f"num_on_trainer_gpus is {self.num_on_trainer_gpus}, and there are {self.num_engines} engine(s)"
            )
        return self

    @model_validator(mode="after")
    def _prefill_has_what_it_needs(self) -> Self:
        if not self.num_prefill:
            return self
        if self.num_prefill >= self.num_engines:
            raise ValueError(
                f"num_prefill is {self.num_prefill} of num_engines={self.num_engines}: none is left to generate"
            )
        if not self.router.is_sglangs:
            raise ValueError(
                f"num_prefill needs sglang-router, which pairs prefill and decode, and router.policy is "
                f"{self.router.policy}; choose one of its policies, such as cache_aware"
            )
        if self.device == "cpu":
            raise ValueError("num_prefill: engines hand KV from GPU to GPU; on a CPU there is no way for it")
        if self.routing_replay:
            raise ValueError(
                "num_prefill: the router drops the record of experts that routing_replay asks for"
            )
        return self

    @property
    def is_managed(self) -> bool:
        """Whether the run starts and ends them."""
        return not self.urls

    @property
    def num_sharing(self) -> int:
        """How many of them, the last ones, take turns with the trainer."""
        return self.num_engines if self.placement == "shared" else self.num_on_trainer_gpus

    @property
    def num_own_gpus(self) -> int:
        """GPUs that the run takes for them beside the trainer's."""
        if self.device == "cpu" or self.urls:
            return 0
        return (self.num_engines - self.num_sharing) * self.tensor_parallel


class ServedModel(Section):
    """A frozen model beside the policy: the run starts engines for it and ends them, or it is served elsewhere."""

    name: GroupName
    """What it is called in metrics, logs and other sections."""
    path: str | None = None
    """Its Hugging Face directory, written like `model.path`."""
    urls: list[str] = []
    """Servers that serve it already; none: the run starts engines for it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights in the engines of the run."""
    engines: ServersConfig = ServersConfig()
    """The engines of the run that serve it."""
    sglang: dict[str, Any] = {}
    """Further arguments of these engines, as the section `sglang` of the policy's."""

    @property
    def is_managed(self) -> bool:
        """Whether the run starts engines for it."""
        return not self.urls

    @model_validator(mode="after")
    def _is_served_somewhere(self) -> Self:
        if self.path is None and not self.urls:
            raise ValueError(f"{self.name}: give path, for which the run starts engines, or urls of servers")
        return self


class TeacherConfig(ServedModel):
    """A model whose logprobs of the policy's tokens are asked for when an episode has ended (docs/distillation.md)."""

    path: str
    """Its Hugging Face directory, written like `model.path`: its tokenizer must be the policy's, and it is looked at
    although servers elsewhere serve it."""

    environments: list[str] | None = None
    """The ids of the environments whose episodes it teaches, unless a task names another teacher; null: all."""
    weight: PositiveFloat = 1.0
    """Against other teachers of the same episode: their logprobs are averaged so."""
    max_concurrent_requests: PositiveInt = 64
    """Segments that are scored at once, by each process that plays episodes."""
    request_timeout_s: PositiveFloat = 300.0
    """A segment without logprobs by then, waiting and retries included, makes the attempt fail: it is played again."""
    max_retries: NonNegativeInt = 3
    """After an engine that cannot be reached, a 5xx, 408, 425 or 429; other failures are not tried again."""
