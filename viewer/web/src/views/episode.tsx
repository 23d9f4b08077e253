/** One episode: what was said, where the time went, its tokens, and the tree of its segments. */

import { useEffect, useState } from "preact/hooks";

import type { EpisodeDetail, EpisodeKey, PlayOn, Played, RunSummary, SegmentNode, Turn } from "../api";
import { useAnswer } from "../client";
import { count, number, seconds } from "../format";
import { useKeys } from "../keyboard";
import { Swimlane } from "../lanes";
import { MessageView } from "../message";
import { episodeLink, Facts, groupLink, OutcomeChip, Problems, Ready, Signed } from "../parts";
import { link, setQuery, useRoute } from "../router";
import { TokenView } from "../token_view";
import { Foreign, Inline } from "../visible_text";

export function EpisodeView({ run, id }: { run: RunSummary; id: string }) {
  const { query } = useRoute();
  const step = query.get("step");
  const key: EpisodeKey = { run: run.id, id, set: query.get("set") ?? undefined, step: step === null ? undefined : Number(step) };
  const asked = useAnswer("/api/episode", key);
  return <Ready of={asked}>{(episode) => <Episode run={run} episode={episode} />}</Ready>;
}

const TABS: [string, string][] = [["conversation", "Conversation"], ["tokens", "Tokens"], ["ledger", "Ledger"], ["turns", "Turns"]];

function Episode({ run, episode }: { run: RunSummary; episode: EpisodeDetail }) {
  const { query } = useRoute();
  const { row } = episode;
  const key: EpisodeKey = { run: run.id, id: row.episode_id, set: row.set, step: row.step };
  const tab = TABS.find(([name]) => name === query.get("tab"))?.[0] ?? "conversation";
  const place = episode.siblings.indexOf(row.episode_id);
  const sibling = (by: number) => {
    const next = episode.siblings[place + by];
    return next === undefined ? null : episodeLink(run.id, { ...row, episode_id: next }, tab === "conversation" ? {} : { tab });
  };
  const visit = (by: number) => {
    const target = sibling(by);
    if (target) location.hash = target;
  };
  const turnChosen = (turn: number) => {
    setQuery({ tab: null, turn });
  };
  useKeys([
    { keys: ["n"], help: "next episode of the group", run: () => visit(1) },
    { keys: ["p"], help: "previous episode of the group", run: () => visit(-1) },
    ...TABS.map(([name, title], at) => ({
      keys: [String(at + 1)], help: title.toLowerCase(), run: () => setQuery({ tab: at === 0 ? null : name }),
    })),
  ]);
  return (
    <>
      <div class="head">
        <h1>
          <Inline text={row.task_id || row.episode_id} limit={160} />
        </h1>
        <OutcomeChip row={row} />
        {row.dropped !== null && (
          <span class="chip warn">
            dropped: <Inline text={row.dropped} />
          </span>
        )}
        <span class="push">
          {place >= 0 && episode.siblings.length > 1 && (
            <>
              <a href={sibling(-1) ?? undefined} aria-disabled={place === 0} aria-label="Previous episode of the group">←</a>{" "}
              <a href={groupLink(run.id, row)}>
                {place + 1} of {episode.siblings.length} in the group
              </a>{" "}
              <a href={sibling(1) ?? undefined} aria-disabled={place === episode.siblings.length - 1} aria-label="Next episode of the group">→</a>
            </>
          )}
        </span>
      </div>
      {row.dropped !== null && (
        <ul class="notes">
          <li>
            No step was trained on this episode: <Inline text={row.dropped} limit={500} />
          </li>
        </ul>
      )}
      <Problems problems={episode.problems} />
      {episode.error !== null && (
        <div class="failure" role="group" aria-label="Why it failed">
          {episode.failed_part && (
            <b>
              <Inline text={episode.failed_part} />
            </b>
          )}
          <Foreign text={episode.error} mono />
        </div>
      )}
      <EpisodeFacts episode={episode} />
      <Swimlane turns={episode.turns} row={row} onTurn={turnChosen} />
      <nav class="tabs inner" aria-label="Parts of the episode">
        {TABS.map(([name, title]) => {
          const next = new URLSearchParams(query);
          if (name === "conversation") next.delete("tab");
          else next.set("tab", name);
          return (
            <a key={name} href={link(["run", run.id, "episode", row.episode_id], next)} aria-current={name === tab ? "page" : undefined}>
              {title}
              {name === "ledger" && episode.segments.length > 1 && ` (${episode.segments.length})`}
            </a>
          );
        })}
      </nav>
      {tab === "conversation" && <Conversation run={run} episode={episode} />}
      {tab === "tokens" && <TokensTab episode={episode} of={key} />}
      {tab === "ledger" && <Ledger run={run} episode={episode} />}
      {tab === "turns" && <Turns episode={episode} />}
    </>
  );
}

function EpisodeFacts({ episode }: { episode: EpisodeDetail }) {
  const { row } = episode;
  const rewards = [...Object.entries(row.reward_parts), ...Object.entries(episode.role_rewards)];
  const facts: [string, preact.ComponentChildren][] = [
    ["reward", number(row.reward, 4)],
    ["advantage", <Signed key="a" value={row.advantage} />],
    ...rewards.map(([name, value]) => [name, number(value, 3)] as [string, string]),
    ["turns", number(row.num_turns)],
    ["tool calls", row.num_tool_errors ? `${row.num_tool_calls}, ${count(row.num_tool_errors, "error")}` : number(row.num_tool_calls)],
    ["tokens drawn", number(row.num_drawn_tokens)],
    ["took", seconds(row.total_s)],
  ];
  if (row.min_version !== null) {
    facts.push(["policy version", row.min_version === row.max_version ? String(row.min_version) : `${row.min_version} to ${row.max_version}`]);
  }
  if (episode.num_lost_tokens > 0) facts.push(["tokens lost", number(episode.num_lost_tokens)]);
  if (episode.num_recovered_calls > 0) facts.push(["calls recovered", number(episode.num_recovered_calls)]);
  for (const [name, value] of Object.entries(row.metrics)) facts.push([name, number(value, 3)]);
  return <Facts facts={facts} />;
}

function Conversation({ run, episode }: { run: RunSummary; episode: EpisodeDetail }) {
  const { query } = useRoute();
  const { messages, row } = episode;
  const turn = query.get("turn") === null ? null : Number(query.get("turn"));
  const given = query.get("message") === null ? null : Number(query.get("message"));
  const at = given ?? (turn === null ? -1 : messages.findIndex((one) => one.turn === turn && one.role === "assistant"));
  const [playing, setPlaying] = useState<{ turn: number; id: string } | null>(null);
  const [refused, setRefused] = useState<string | null>(null);
  const policy = useAnswer("/api/runs", {}).answer?.policy ?? null;
  const select = (index: number) => setQuery({ message: Math.max(0, Math.min(messages.length - 1, index)), turn: null });
  useEffect(() => {
    if (at >= 0) document.getElementById(`message-${at}`)?.scrollIntoView({ block: "nearest" });
  }, [at, messages.length]);
  useKeys([
    { keys: ["j", "ArrowDown"], help: "next message", run: () => select(at + 1) },
    { keys: ["k", "ArrowUp"], help: "previous message", run: () => select(at - 1) },
    {
      keys: ["Enter", "o"], help: "unfold the message, and fold it",
      run: () => {
        const folds = document.querySelectorAll<HTMLDetailsElement>(`#message-${at} details`);
        const open = ![...folds].some((one) => one.open);
        for (const one of folds) one.open = open;
      },
    },
  ]);
  const play = async (from: number) => {
    if (!policy) return;
    setRefused(null);
    const wanted: PlayOn = { run: run.id, set: row.set, step: row.step, id: row.episode_id, turn: from };
    try {
      const response = await fetch("/api/play", {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Polyturn-Token": policy.token },
        body: JSON.stringify(wanted),
      });
      const body = (await response.json()) as { id?: string; error?: string };
      if (!response.ok || !body.id) throw new Error(body.error ?? `The server answered ${response.status}.`);
      setPlaying({ turn: from, id: body.id });
    } catch (error) {
      setRefused((error as Error).message);
    }
  };
  const turnOf = new Map(episode.turns.map((one) => [one.turn, one]));
  return (
    <>
      {refused && (
        <div class="failure" role="alert">
          <Inline text={refused} limit={600} />
        </div>
      )}
      <ol class="turns" aria-label="Messages">
        {messages.map((message, index) => {
          const own = message.role === "assistant" && message.turn !== null ? turnOf.get(message.turn) : undefined;
          return (
            <li key={message.index}>
              <MessageView
                message={message} selected={index === at} id={`message-${index}`}
                aside={
                  own && (
                    <>
                      {own.reward ? <span>reward {number(own.reward, 3)} · </span> : null}
                      {own.num_sampled > 0 && <span>{count(own.num_sampled, "token")}</span>}
                      {own.generate_s !== null && <span> · {seconds(own.generate_s)}</span>}
                      {policy && episode.not_playable === null && (
                        <>
                          {" · "}
                          <button type="button" class="quiet" onClick={() => void play(own.turn)}>
                            Play on from here
                          </button>
                        </>
                      )}
                    </>
                  )
                }
              />
            </li>
          );
        })}
      </ol>
      {!messages.length && <p class="empty">No message was kept.</p>}
      {policy && episode.not_playable !== null && (
        <p class="muted">
          Cannot be played on: <Inline text={episode.not_playable} limit={400} />
        </p>
      )}
      {playing && <PlayedOn key={playing.id} id={playing.id} turn={playing.turn} label={policy?.label ?? ""} />}
    </>
  );
}

function PlayedOn({ id, turn, label }: { id: string; turn: number; label: string }) {
  const [played, setPlayed] = useState<Played | null>(null);
  const [error, setError] = useState<string | null>(null);
  useEffect(() => {
    let timer = 0;
    let over = false;
    const poll = async () => {
      try {
        const response = await fetch(`/api/played?id=${encodeURIComponent(id)}`);
        const body = (await response.json()) as Played & { error?: string };
        if (!response.ok) throw new Error(body.error ?? `The server answered ${response.status}.`);
        if (over) return;
        setPlayed(body);
        if (body.state === "playing") timer = setTimeout(() => void poll(), 700);
      } catch (failed) {
        if (!over) setError((failed as Error).message);
      }
    };
    void poll();
    return () => {
      over = true;
      clearTimeout(timer);
    };
  }, [id]);
  return (
    <section aria-label="Played on" aria-live="polite">
      <h2>
        From turn {turn} on, played by <Inline text={label} />
      </h2>
      {error && (
        <div class="failure">
          <Inline text={error} limit={600} />
        </div>
      )}
      {played && (
        <>
          <p class="legend">
            <span class={`chip ${played.state === "failed" ? "bad" : played.state === "done" ? "good" : "accent live"}`}>{played.state}</span>
            {played.reward !== null && <span>reward {number(played.reward, 3)}</span>}
            {played.outcome && <OutcomeChip row={{ outcome: played.outcome, stop_reason: played.stop_reason ?? "" }} />}
            {played.reason && <Inline text={played.reason} limit={600} />}
          </p>
          <Problems problems={played.differences} />
          <ol class="turns">
            {played.messages
              .filter((message) => message.turn !== null && message.turn >= turn)
              .map((message) => (
                <li key={message.index}>
                  <MessageView message={message} />
                </li>
              ))}
          </ol>
        </>
      )}
    </section>
  );
}

function TokensTab({ episode, of }: { episode: EpisodeDetail; of: EpisodeKey }) {
  const { query } = useRoute();
  if (!episode.segments.length) return <p class="empty">This episode has no tokens: who played it gave none.</p>;
  const asked = Number(query.get("segment") ?? episode.segments[0]?.segment);
  const segment = episode.segments.find((one) => one.segment === asked) ?? episode.segments[0];
  if (!segment) return null;
  return (
    <>
      {episode.segments.length > 1 && (
        <div class="filters" role="group" aria-label="Segment">
          {episode.segments.map((one) => (
            <button
              key={one.segment} type="button" class="plain" aria-pressed={one === segment}
              onClick={() => setQuery({ segment: one.segment, token: null })}
            >
              {one.segment}
              {one.role && (
                <>
                  {" "}
                  <Inline text={one.role} />
                </>
              )}{" "}
              <span class="muted">{count(one.num_tokens, "token")}</span>
            </button>
          ))}
        </div>
      )}
      <TokenView key={segment.segment} episode={of} segment={segment.segment} />
    </>
  );
}

function Ledger({ run, episode }: { run: RunSummary; episode: EpisodeDetail }) {
  const roots = episode.segments.filter((one) => one.parent === null);
  return (
    <section class="panel" aria-label="Ledger">
      <p class="muted">
        Linear runs of tokens. Where history was rewritten another begins, which shares a prefix with an earlier one; each sampled token is
        trained on once.
      </p>
      <ul class="tree">
        {roots.map((one) => (
          <Branch key={one.segment} node={one} all={episode.segments} />
        ))}
      </ul>
      {episode.relatives.length > 0 && (
        <>
          <h3>Episodes of its tree</h3>
          <ul class="tree">
            {episode.relatives.map((one) => (
              <li key={one.episode_id}>
                <a href={episodeLink(run.id, { ...episode.row, episode_id: one.episode_id })}>
                  <Inline text={one.episode_id} />
                  <span class="muted">
                    {one.branch_turn ? `branches at turn ${one.branch_turn}` : "trunk"}, reward {number(one.reward, 3)}
                  </span>
                </a>
              </li>
            ))}
          </ul>
        </>
      )}
    </section>
  );
}

function Branch({ node, all }: { node: SegmentNode; all: SegmentNode[] }) {
  const children = all.filter((one) => one.parent === node.segment);
  const most = Math.max(1, ...all.map((one) => one.num_tokens));
  const { query, path } = useRoute();
  const next = new URLSearchParams(query);
  next.set("tab", "tokens");
  next.set("segment", String(node.segment));
  next.delete("token");
  return (
    <li>
      <a href={link(path, next)}>
        <b>Segment {node.segment}</b>
        {node.role && <Inline text={node.role} />}
        <span class="muted">
          {count(node.num_tokens, "token")}, {number(node.num_sampled)} sampled
          {node.parent !== null && `, the first ${number(node.num_shared)} as in segment ${node.parent}`}
          {node.first_turn !== null && `, turns ${node.first_turn} to ${node.last_turn}`}
        </span>
        <span class="run-bar" aria-hidden="true">
          <span class="shared-run" style={{ width: `${(100 * node.num_shared) / most}%` }} />
          <span class="own-run" style={{ width: `${(100 * (node.num_tokens - node.num_shared)) / most}%` }} />
        </span>
        {node.advantage !== null && (
          <span>
            advantage <Signed value={node.advantage} />
          </span>
        )}
      </a>
      {children.length > 0 && (
        <ul>
          {children.map((one) => (
            <Branch key={one.segment} node={one} all={all} />
          ))}
        </ul>
      )}
    </li>
  );
}

const TURN_COLUMNS: [string, (turn: Turn) => preact.ComponentChildren][] = [
  ["Turn", (turn) => turn.turn],
  ["Reward", (turn) => number(turn.reward, 3)],
  ["Sampled", (turn) => number(turn.num_sampled)],
  ["Context", (turn) => number(turn.num_context)],
  ["Version", (turn) => (turn.min_version === turn.max_version ? number(turn.min_version) : `${turn.min_version}–${turn.max_version}`)],
  ["Mean logprob", (turn) => number(turn.mean_logprob, 3)],
  ["|trainer − engine|", (turn) => number(turn.mean_difference, 3)],
  ["Advantage", (turn) => <Signed value={turn.mean_advantage} />],
  ["Queue", (turn) => seconds(turn.queue_s)],
  ["Generate", (turn) => seconds(turn.generate_s)],
  ["Tools", (turn) => seconds(turn.tools_s)],
];

function Turns({ episode }: { episode: EpisodeDetail }) {
  return (
    <>
      <div class="panel scroll" tabIndex={0} role="region" aria-label="Turns">
        <table>
          <thead>
            <tr>
              {TURN_COLUMNS.map(([name], at) => (
                <th key={name} scope="col" class={at ? "numeric" : ""}>
                  {name}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {episode.turns.map((turn) => (
              <tr key={turn.turn}>
                {TURN_COLUMNS.map(([name, cell], at) => (
                  <td key={name} class={at ? "numeric" : ""}>
                    {cell(turn)}
                    {at === 0 && turn.role && (
                      <>
                        {" "}
                        <Inline text={turn.role} />
                      </>
                    )}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {episode.tools.length > 0 && (
        <>
          <h2>Tools</h2>
          <div class="panel scroll" tabIndex={0} role="region" aria-label="Tools">
            <table>
              <thead>
                <tr>
                  {["Tool", "Calls", "Failures", "Timeouts", "Cut", "Seconds", "Longest", "Waited", "Cost"].map((name, at) => (
                    <th key={name} scope="col" class={at ? "numeric" : ""}>
                      {name}
                    </th>
                  ))}
                </tr>
              </thead>
              <tbody>
                {episode.tools.map((tool) => (
                  <tr key={tool.name}>
                    <td>
                      <Inline text={tool.name} />
                    </td>
                    <td class="numeric">{number(tool.num_calls)}</td>
                    <td class="numeric">{number(tool.num_failures)}</td>
                    <td class="numeric">{number(tool.num_timeouts)}</td>
                    <td class="numeric">{number(tool.num_truncated)}</td>
                    <td class="numeric">{seconds(tool.seconds)}</td>
                    <td class="numeric">{seconds(tool.max_seconds)}</td>
                    <td class="numeric">{seconds(tool.queue_s)}</td>
                    <td class="numeric">{number(tool.cost)}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </>
      )}
    </>
  );
}

