/** The episodes of a step, of all steps, or of an evaluation: a histogram that filters, and a table. */

import { useCallback, useEffect, useMemo, useRef, useState } from "preact/hooks";

import type { Column as ApiColumn, EpisodeFilter, EpisodePage, EpisodeRow, Histogram as Bins, RunSummary } from "../api";
import { ask, useAnswer, useChanges, useRested } from "../client";
import { valueOf } from "../embedded";
import { count, number, seconds } from "../format";
import { Histogram } from "../histogram";
import { useKeys } from "../keyboard";
import { episodeLink, groupLink, OutcomeChip, Problems, Ready, Signed } from "../parts";
import { setQuery, useRoute } from "../router";
import { Inline } from "../visible_text";
import type { Column, Sort } from "../virtual_table";
import { VirtualTable } from "../virtual_table";

const PAGE = 50;

export function EpisodesView({ run }: { run: RunSummary }) {
  const { query } = useRoute();
  const set = run.sets.find((one) => one.name === query.get("set")) ?? run.sets[0];
  if (!set) return <p class="empty">No episode has been written.</p>;
  const all = query.get("step") === "all";
  const given = Number(query.get("step"));
  // Without a step in the link the newest is shown, and the one after it when it comes.
  const step = query.get("step") !== null && Number.isFinite(given) ? given : (set.steps[set.steps.length - 1] ?? 0);
  return (
    <>
      <div class="filters" role="group" aria-label="Which episodes">
        {run.sets.length > 1 && (
          <select aria-label="Episodes of" value={set.name} onChange={(event) => setQuery({ set: event.currentTarget.value, step: null })}>
            {run.sets.map((one) => (
              <option key={one.name} value={one.name}>
                {one.title}
              </option>
            ))}
          </select>
        )}
        {set.steps.length > 1 && (
          <button type="button" class="plain" aria-pressed={all} onClick={() => setQuery({ step: all ? null : "all" })}>
            All steps
          </button>
        )}
        {run.state === "running" && set.kind === "train" && !all && query.get("step") === null && <span class="chip accent live">follows the newest step</span>}
      </div>
      {set.steps.length > 1 && !all && <StepSlider steps={set.steps} step={step} />}
      {!all && set.kind !== "entry" && <StepFacts run={run.id} set={set.name} step={step} />}
      <Episodes key={set.name} run={run.id} set={set.name} step={all ? null : step} />
    </>
  );
}

function StepSlider({ steps, step }: { steps: number[]; step: number }) {
  const at = Math.max(0, steps.indexOf(step));
  const choose = (index: number) => {
    const last = index >= steps.length - 1;
    setQuery({ step: last ? null : steps[Math.max(0, index)] });
  };
  useKeys([
    { keys: ["ArrowRight", "l"], help: "next step", run: () => choose(at + 1) },
    { keys: ["ArrowLeft", "h"], help: "previous step", run: () => choose(at - 1) },
  ]);
  return (
    <div class="slider">
      <label for="step-slider">Step</label>
      <input
        id="step-slider" type="range" min={0} max={steps.length - 1} value={at} aria-valuetext={`step ${step}`}
        onInput={(event) => choose(Number(event.currentTarget.value))}
      />
      <output for="step-slider">
        {step} of {steps[steps.length - 1]}
      </output>
    </div>
  );
}

function StepFacts({ run, set, step }: { run: string; set: string; step: number }) {
  const asked = useAnswer("/api/step", { run, set, step });
  return (
    <Ready of={asked}>
      {({ summary, dropped, problems }) => (
        <>
          <p class="legend">
            <span>{count(summary.num_episodes, "episode")} in {count(summary.num_groups, "group")}</span>
            <span>mean reward {number(summary.reward_mean, 3)}</span>
            {summary.num_uniform_groups > 0 && (
              <span title="Nothing is learnt from a group whose rewards are all alike">{count(summary.num_uniform_groups, "uniform group")}</span>
            )}
            {Object.entries(dropped).map(([reason, many]) => (
              <button key={reason} type="button" class="quiet" onClick={() => setQuery({ dropped: "yes" })}>
                {number(many)} dropped: <Inline text={reason} />
              </button>
            ))}
            {summary.alarms.map((name) => (
              <span key={name} class="chip warn">
                <Inline text={name} />
              </span>
            ))}
            {summary.is_live && <span class="chip accent live">under way</span>}
          </p>
          <Problems problems={problems} />
        </>
      )}
    </Ready>
  );
}

/** A number of the address; what is none is as if it were not there. */
function numberOf(text: string | null): number | undefined {
  if (text === null || text.trim() === "") return undefined;
  const value = Number(text);
  return Number.isFinite(value) ? value : undefined;
}

function filterOf(run: string, set: string, step: number | null, query: URLSearchParams): EpisodeFilter {
  const word = (name: string) => query.get(name) || undefined;
  const yes = (name: string) => (query.has(name) ? query.get(name) === "yes" : undefined);
  return {
    run,
    set,
    step: step ?? undefined,
    min_reward: numberOf(query.get("min")),
    max_reward: numberOf(query.get("max")),
    outcome: word("outcome") as EpisodeFilter["outcome"],
    stop_reason: word("stop"),
    tool_error: yes("tool_error"),
    text: word("text"),
    environment: word("env"),
    task: word("task"),
    group: word("group"),
    version: numberOf(query.get("version")),
    dropped: yes("dropped"),
    sort: word("sort"),
  };
}

function Episodes({ run, set, step }: { run: string; set: string; step: number | null }) {
  const { query } = useRoute();
  const filter = filterOf(run, set, step, query);
  const pages = usePages(filter);
  // The histogram is of what the other filters leave: the bars stay where they are while an interval is chosen.
  const isChosen = filter.min_reward !== undefined || filter.max_reward !== undefined;
  const whole = useAnswer(
    "/api/episodes",
    isChosen ? { ...filter, min_reward: undefined, max_reward: undefined, sort: undefined, limit: 1 } : null,
  );
  const bins = (isChosen ? whole.answer : pages.answer)?.histogram;
  return (
    <>
      {bins && bins.counts.length > 0 && (
        <Rewards bins={bins} low={filter.min_reward} high={filter.max_reward} />
      )}
      <Filters filter={filter} />
      <Ready of={pages}>
        {(first) => (
          <>
            <Problems problems={first.problems} />
            <EpisodeTable run={run} page={first} row={pages.row} onVisible={pages.onVisible} sort={filter.sort} step={step} filterKey={JSON.stringify(filter)} />
          </>
        )}
      </Ready>
    </>
  );
}

function Rewards({ bins, low, high }: { bins: Bins; low: number | undefined; high: number | undefined }) {
  const first = bins.edges[0] ?? 0;
  const last = bins.edges[bins.edges.length - 1] ?? 1;
  return (
    <Histogram
      label="Reward"
      bins={bins}
      range={low === undefined && high === undefined ? null : [low ?? first, high ?? last]}
      onRange={(range) => {
        if (range === null) setQuery({ min: null, max: null });
        // A bin ends before its upper edge, but the last one.
        else setQuery({ min: rounded(range[0]), max: range[1] >= last ? rounded(last) : rounded(range[1] - (last - first) * 1e-6) });
      }}
    />
  );
}

function rounded(value: number): number {
  return Number(value.toPrecision(9));
}

function Filters({ filter }: { filter: EpisodeFilter }) {
  const [text, setText] = useState(filter.text ?? "");
  const rested = useRested(text, 250);
  const field = useRef<HTMLInputElement>(null);
  useEffect(() => {
    if (rested !== (filter.text ?? "")) setQuery({ text: rested });
  }, [rested]);
  useEffect(() => setText(filter.text ?? ""), [filter.text]);
  useKeys([
    { keys: ["/"], help: "search the text of episodes", run: () => field.current?.focus() },
    {
      keys: ["Escape"], help: "", always: true,
      run: () => {
        if (document.activeElement !== field.current) return false;
        field.current?.blur();
      },
    },
  ]);
  const active = ["min", "max", "outcome", "stop", "tool_error", "text", "env", "task", "group", "version", "dropped"];
  const { query } = useRoute();
  const given: [string, string | undefined][] = [
    ["stop", filter.stop_reason],
    ["env", filter.environment],
    ["task", filter.task],
    ["group", filter.group],
    ["version", filter.version?.toString()],
  ];
  return (
    <div class="filters" role="search" aria-label="Filter episodes">
      <input
        ref={field} type="search" placeholder="Search messages  ( / )" aria-label="Search in messages" value={text}
        onInput={(event) => setText(event.currentTarget.value)}
      />
      <input
        type="number" step="any" class="short" aria-label="Reward from" placeholder="reward ≥" value={filter.min_reward ?? ""}
        onChange={(event) => setQuery({ min: event.currentTarget.value })}
      />
      <input
        type="number" step="any" class="short" aria-label="Reward to" placeholder="≤" value={filter.max_reward ?? ""}
        onChange={(event) => setQuery({ max: event.currentTarget.value })}
      />
      <select aria-label="Outcome" value={filter.outcome ?? ""} onChange={(event) => setQuery({ outcome: event.currentTarget.value })}>
        <option value="">any outcome</option>
        <option value="completed">completed</option>
        <option value="truncated">truncated</option>
        <option value="failed">failed</option>
      </select>
      <select aria-label="Tool errors" value={query.get("tool_error") ?? ""} onChange={(event) => setQuery({ tool_error: event.currentTarget.value })}>
        <option value="">tools: any</option>
        <option value="yes">a tool error</option>
        <option value="no">no tool error</option>
      </select>
      <select aria-label="Trained on" value={query.get("dropped") ?? ""} onChange={(event) => setQuery({ dropped: event.currentTarget.value })}>
        <option value="">trained on or not</option>
        <option value="no">trained on</option>
        <option value="yes">dropped</option>
      </select>
      {given.map(
        ([name, value]) =>
          value !== undefined && (
            <button key={name} type="button" class="plain" aria-label={`Remove the filter ${name}`} onClick={() => setQuery({ [name]: null })}>
              {name}: <Inline text={value} limit={40} /> ✕
            </button>
          ),
      )}
      {active.some((name) => query.has(name)) && (
        <button type="button" class="quiet" onClick={() => setQuery(Object.fromEntries(active.map((name) => [name, null])))}>
          Clear
        </button>
      )}
    </div>
  );
}

/** Rows of all that matches, asked a page at a time when they come into sight. */
function usePages(filter: EpisodeFilter) {
  const key = JSON.stringify(filter);
  const changed = useChanges();
  const [first, setFirst] = useState<{ key: string; page: EpisodePage | null; error: string | null }>({ key, page: null, error: null });
  const held = useRef({ key, pages: new Map<number, EpisodeRow[]>() });
  const asked = useRef(new Set<string>());
  /** The first and the last page of which rows are in sight: the table is lower than a page. */
  const inSight = useRef<[number, number]>([0, 0]);
  const generation = `${changed} ${key}`;
  const current = useRef(key);
  current.current = key;
  const [, redraw] = useState(0);
  const fetchPage = useCallback(
    (index: number) => {
      const name = `${index} ${generation}`;
      if (asked.current.has(name)) return;
      asked.current.add(name);
      ask("/api/episodes", { ...filter, offset: index * PAGE, limit: PAGE }).then(
        (page) => {
          if (current.current !== key) return;
          if (held.current.key !== key) held.current = { key, pages: new Map() };
          held.current.pages.set(index, page.rows);
          redraw((before) => before + 1);
          if (index === 0) setFirst({ key, page, error: null });
        },
        (error: Error) => {
          asked.current.delete(name);
          if (current.current === key && index === 0) setFirst({ key, page: null, error: error.message });
        },
      );
    },
    [generation],
  );
  useEffect(() => {
    // What is in sight stays there until what replaces it has come, and the table asks for that; the rest is asked for
    // when it comes into sight again.
    const [from, end] = inSight.current;
    for (const name of [...asked.current]) if (!name.endsWith(generation)) asked.current.delete(name);
    for (const index of [...held.current.pages.keys()]) if (index < from || index > end) held.current.pages.delete(index);
    fetchPage(0);
  }, [fetchPage]);
  return {
    answer: first.page,
    error: first.error,
    pending: first.key !== key,
    row: (index: number) =>
      first.key === key && held.current.key === key
        ? held.current.pages.get(Math.floor(index / PAGE))?.[index % PAGE]
        : first.page?.rows[index],
    onVisible: useCallback(
      (from: number, end: number) => {
        inSight.current = [Math.floor(from / PAGE), Math.floor(Math.max(from, end - 1) / PAGE)];
        for (const page of inSight.current) fetchPage(page);
      },
      [fetchPage],
    ),
  };
}

/** What readers look for first stands first; the others follow as they come. */
const FIRST = ["task_id", "reward", "advantage", "outcome", "num_turns", "num_tool_calls", "num_tool_errors", "num_drawn_tokens", "total_s", "dropped"];
/** Said by another column, or the same in every row. */
const HIDDEN = ["stop_reason", "env_id"];

function inOrder(columns: ApiColumn[]): ApiColumn[] {
  const place = (column: ApiColumn) => {
    const at = FIRST.indexOf(column.name);
    return at < 0 ? FIRST.length : at;
  };
  return [...columns].sort((a, b) => place(a) - place(b));
}

const WIDTHS: Record<string, number> = { episode_id: 150, task_id: 160, outcome: 170, stop_reason: 130, error: 240, group_id: 120, env_id: 170, dropped: 170 };

function cellOf(run: string, column: ApiColumn, row: EpisodeRow) {
  if (column.name === "group_id") {
    return (
      <a href={groupLink(run, row)} tabIndex={-1}>
        <Inline text={row.group_id} limit={60} />
      </a>
    );
  }
  if (column.name === "outcome") return <OutcomeChip row={row} />;
  if (column.name === "advantage") return <Signed value={row.advantage} />;
  const value = valueOf(row, column.name);
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") return column.kind === "seconds" ? seconds(value) : number(value, 3);
  return <Inline text={String(value)} limit={120} />;
}

function EpisodeTable(props: {
  run: string;
  page: EpisodePage;
  row: (index: number) => EpisodeRow | undefined;
  onVisible: (first: number, end: number) => void;
  sort: string | undefined;
  step: number | null;
  filterKey: string;
}) {
  const { run, page } = props;
  const { query } = useRoute();
  const chosen = query.get("columns")?.split(",");
  const all = useMemo(() => inOrder(page.columns), [page.columns]);
  const isShown = (column: ApiColumn) => column.is_shown && !HIDDEN.includes(column.name) && (column.name !== "step" || props.step === null);
  const shown = all.filter((column) => (chosen ? chosen.includes(column.name) : isShown(column)));
  const names = shown.map((column) => column.name).join();
  const columns = useMemo(
    (): Column<EpisodeRow>[] =>
      (shown.length ? shown : all.slice(0, 1)).map((column) => ({
        key: column.name,
        label: column.title,
        title: column.name,
        width: WIDTHS[column.name] ?? (column.kind === "text" ? 150 : Math.max(84, 26 + 8 * column.title.length)),
        numeric: column.kind !== "text",
        sortable: true,
        cell: (row) => cellOf(run, column, row),
      })),
    [names, run],
  );
  const sort: Sort | null = props.sort ? { key: props.sort.replace(/^-/, ""), descending: props.sort.startsWith("-") } : null;
  const toggle = (name: string) => {
    const current = shown.map((column) => column.name);
    const next = current.includes(name) ? current.filter((one) => one !== name) : [...current, name];
    setQuery({ columns: all.map((column) => column.name).filter((one) => next.includes(one)).join() });
  };
  return (
    <>
      <div class="legend">
        <span role="status">
          {page.num_matching === page.num_all ? count(page.num_all, "episode") : `${number(page.num_matching)} of ${count(page.num_all, "episode")}`}
        </span>
        <details class="columns-choice">
          <summary>Columns</summary>
          <div class="metric-names">
            {all.map((column) => (
              <label key={column.name} class="check">
                <input type="checkbox" checked={shown.includes(column)} onChange={() => toggle(column.name)} />
                <Inline text={column.title} limit={60} />
              </label>
            ))}
          </div>
        </details>
      </div>
      <VirtualTable
        label="Episodes"
        columns={columns}
        count={page.num_matching}
        row={props.row}
        restart={props.filterKey}
        onVisible={props.onVisible}
        sort={sort}
        onSort={(next) => setQuery({ sort: `${next.descending ? "-" : ""}${next.key}` })}
        href={(row) => episodeLink(run, row)}
        empty="No episode passes the filter."
      />
    </>
  );
}
