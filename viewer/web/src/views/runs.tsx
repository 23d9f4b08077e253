/** The list of runs. */

import { useState } from "preact/hooks";

import type { RunSummary } from "../api";
import { useAnswer } from "../client";
import { ago, number } from "../format";
import { useKeys } from "../keyboard";
import { Alarms, Facts, Problems, Ready, State } from "../parts";
import { go, link } from "../router";
import { Inline } from "../visible_text";

export function RunsView() {
  const asked = useAnswer("/api/runs", {});
  return (
    <>
      <div class="head">
        <h1>Runs</h1>
      </div>
      <Ready of={asked}>
        {({ runs, problems }) => (
          <>
            <Problems problems={problems} />
            {runs.length ? <RunList runs={runs} /> : <p class="empty">No run was found.</p>}
          </>
        )}
      </Ready>
    </>
  );
}

export function runLink(run: RunSummary): string {
  return link(["run", run.id, run.kind === "evaluation" ? "report" : run.kind === "rollout" ? "episodes" : "curves"]);
}

function RunList({ runs }: { runs: RunSummary[] }) {
  const [at, setAt] = useState(0);
  const [chosen, setChosen] = useState<string[]>([]);
  const selected = runs[Math.min(at, runs.length - 1)];
  const move = (by: number) => {
    const next = Math.max(0, Math.min(runs.length - 1, at + by));
    setAt(next);
    document.getElementById(`run-${next}`)?.scrollIntoView({ block: "nearest" });
  };
  const toggle = (id: string) => setChosen((before) => (before.includes(id) ? before.filter((one) => one !== id) : [...before, id]));
  useKeys([
    { keys: ["j", "ArrowDown"], help: "next run", run: () => move(1) },
    { keys: ["k", "ArrowUp"], help: "previous run", run: () => move(-1) },
    { keys: ["x"], help: "choose the run, to see several together", run: () => selected && toggle(selected.id) },
    {
      keys: ["Enter", "o"],
      help: "open the run",
      run: () => {
        if (selected) location.hash = runLink(selected);
      },
    },
  ]);
  const picked = runs.filter((run) => chosen.includes(run.id));
  const evaluations = picked.filter((run) => run.kind === "evaluation");
  return (
    <>
      {runs.length > 1 && (
        <div class="filters" role="group" aria-label="Several runs">
          <button type="button" class="plain" disabled={picked.length < 2} onClick={() => go(["curves"], withRuns(picked))}>
            Curves of {picked.length || "the"} chosen
          </button>
          <button
            type="button"
            class="plain"
            disabled={evaluations.length !== 2 || picked.length !== 2}
            onClick={() => go(["compare"], { a: evaluations[0]?.id, b: evaluations[1]?.id })}
          >
            Compare two evaluations
          </button>
          <span class="muted">{picked.length === 0 ? "Choose runs to see them over one another." : ""}</span>
        </div>
      )}
      <ul class="cards" aria-label="Runs">
        {runs.map((run, index) => (
          <li key={run.id} id={`run-${index}`} class={`card${index === at ? " selected" : ""}`}>
            <div>
              <a class="title" href={runLink(run)}>
                <Inline text={run.name} />
              </a>{" "}
              <span class="muted">{run.kind === "training" ? "" : run.kind}</span>
              <div class="muted">
                {run.environments.map((name, place) => (
                  <span key={name}>
                    {place > 0 && ", "}
                    <Inline text={name} />
                  </span>
                ))}
                {run.policy && (
                  <>
                    {run.environments.length > 0 && " · "}
                    <Inline text={run.policy} limit={90} />
                  </>
                )}
              </div>
            </div>
            <div class="state">
              {run.updated !== null && <span class="muted">{ago(run.updated)}</span>}
              <State state={run.state} />
              {runs.length > 1 && (
                <label class="check">
                  <input type="checkbox" checked={chosen.includes(run.id)} onChange={() => toggle(run.id)} />
                  <span class="vh">Choose {run.name}</span>
                </label>
              )}
            </div>
            <Facts
              facts={[
                ...(run.step !== null && run.kind !== "evaluation"
                  ? ([["step", run.num_steps ? `${number(run.step)} of ${number(run.num_steps)}` : number(run.step)]] as [string, string][])
                  : []),
                ...Object.entries(run.headline).map(([name, value]) => [name, number(value)] as [string, string]),
              ]}
            />
            {run.reason && (
              <ul class="notes">
                <li class={run.state === "failed" ? "bad" : ""}>
                  <Inline text={run.reason} limit={600} />
                </li>
              </ul>
            )}
            <Alarms alarms={run.alarms} />
          </li>
        ))}
      </ul>
    </>
  );
}

function withRuns(runs: RunSummary[]): URLSearchParams {
  const query = new URLSearchParams();
  for (const run of runs) query.append("run", run.id);
  return query;
}
