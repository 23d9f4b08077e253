/** What stands over every view of one run: its name, its state, and the ways to its views. */

import type { ComponentChildren } from "preact";

import type { RunSummary } from "../api";
import { useAnswer } from "../client";
import { Ready, State } from "../parts";
import { link } from "../router";
import { Inline } from "../visible_text";

const TABS: Record<RunSummary["kind"], [string, string][]> = {
  training: [["curves", "Curves"], ["episodes", "Episodes"], ["mismatch", "Mismatch"], ["about", "About"]],
  rollout: [["episodes", "Episodes"], ["about", "About"]],
  evaluation: [["report", "Report"], ["episodes", "Episodes"], ["about", "About"]],
};

interface Props {
  id: string;
  tab: string;
  /** A view of one part of the run has a head of its own. */
  isPart: boolean;
  children: (run: RunSummary) => ComponentChildren;
}

export function RunFrame({ id, tab, isPart, children }: Props) {
  const asked = useAnswer("/api/runs", {});
  return (
    <Ready of={asked}>
      {({ runs }) => {
        const run = runs.find((one) => one.id === id);
        if (!run) {
          return (
            <p class="failure" role="alert">
              There is no run <Inline text={id} />. <a href="#/">All runs</a>
            </p>
          );
        }
        return (
          <>
            {!isPart && (
              <div class="head">
                <h1>
                  <Inline text={run.name} />
                </h1>
                <State state={run.state} />
                <p class="lead">
                  {run.environments.map((name) => (
                    <span key={name}>
                      <Inline text={name} />{" "}
                    </span>
                  ))}
                  {run.policy && (
                    <>
                      · <Inline text={run.policy} limit={160} />
                    </>
                  )}
                </p>
              </div>
            )}
            <nav class="tabs" aria-label="Views of the run">
              {TABS[run.kind].map(([name, title]) => (
                <a key={name} href={link(["run", id, name])} aria-current={name === tab ? "page" : undefined}>
                  {title}
                </a>
              ))}
            </nav>
            {children(run)}
          </>
        );
      }}
    </Ready>
  );
}
