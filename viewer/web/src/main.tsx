/** The page: what stands over every view, which view an address names, and the help. */

import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";

import "uplot/dist/uPlot.min.css";
import "./style.css";

import { startLive, useAnswer } from "./client";
import { exported } from "./embedded";
import { activeBindings, startKeyboard, useKeys } from "./keyboard";
import { Problems, Ready } from "./parts";
import type { Route } from "./router";
import { link, useRoute } from "./router";
import { startTheme, useTheme } from "./theme";
import { AboutView } from "./views/about";
import { CurvesView } from "./views/curves";
import { EpisodesView } from "./views/episodes";
import { EpisodeView } from "./views/episode";
import { GroupView } from "./views/group";
import { MismatchView } from "./views/mismatch";
import { ComparisonView, ReportView } from "./views/report";
import { RunFrame } from "./views/run_frame";
import { RunsView } from "./views/runs";
import { Inline, plain } from "./visible_text";

function View({ route }: { route: Route }) {
  const { path, query } = route;
  if (!path.length) return <RunsView />;
  if (path[0] === "compare") return <ComparisonView a={query.get("a") ?? ""} b={query.get("b") ?? ""} />;
  if (path[0] === "curves") return <SeveralRuns ids={query.getAll("run")} />;
  const id = path[1];
  if (path[0] !== "run" || id === undefined) return <NoSuchPage />;
  const what = path[2] ?? "curves";
  const part = path[3];
  const isPart = what === "group" || what === "episode";
  return (
    <RunFrame key={id} id={id} tab={isPart ? "episodes" : what} isPart={isPart}>
      {(run) => {
        switch (what) {
          case "curves":
            return <CurvesView runs={[run]} single />;
          case "episodes":
            return <EpisodesView run={run} />;
          case "group":
            return <GroupView key={part} run={run} id={part ?? ""} />;
          case "episode":
            return <EpisodeView key={part} run={run} id={part ?? ""} />;
          case "mismatch":
            return <MismatchView run={run} />;
          case "report":
            return <ReportView run={run} />;
          case "about":
            return <AboutView run={run} />;
          default:
            return <NoSuchPage />;
        }
      }}
    </RunFrame>
  );
}

function NoSuchPage() {
  return (
    <p class="failure" role="alert">
      This address names no view. <a href="#/">All runs</a>
    </p>
  );
}

function SeveralRuns({ ids }: { ids: string[] }) {
  const asked = useAnswer("/api/runs", {});
  return (
    <>
      <div class="head">
        <h1>Curves of {ids.length} runs</h1>
      </div>
      <Ready of={asked}>
        {({ runs }) => {
          const chosen = ids.map((id) => runs.find((run) => run.id === id)).filter((run) => run !== undefined);
          return chosen.length ? <CurvesView runs={chosen} single={false} /> : <NoSuchPage />;
        }}
      </Ready>
    </>
  );
}

/** The way up: what stands over this view, each as its text and link. */
function crumbsOf({ path, query }: Route, nameOf: (id: string) => string): [string, string][] {
  const crumbs: [string, string][] = [["Runs", "#/"]];
  if (path[0] === "compare") crumbs.push(["Comparison", ""]);
  else if (path[0] === "curves") crumbs.push(["Curves", ""]);
  else if (path[0] === "run" && path[1] !== undefined) {
    crumbs.push([nameOf(path[1]), link(["run", path[1], path[2] === "report" || path[2] === "about" ? path[2] : "curves"])]);
    if (path[2] === "group" || path[2] === "episode") {
      const step = query.get("step");
      crumbs.push([step === null ? "Episodes" : `Step ${step}`, link(["run", path[1], "episodes"], { set: query.get("set"), step })]);
      crumbs.push([path[2] === "group" ? "Group" : "Episode", ""]);
    }
  }
  return crumbs;
}

function App() {
  const route = useRoute();
  const runs = useAnswer("/api/runs", {}).answer;
  const [theme, nextTheme] = useTheme();
  const [help, setHelp] = useState(false);
  const main = useRef<HTMLElement>(null);
  const crumbs = crumbsOf(route, (id) => {
    const run = runs?.runs.find((one) => one.id === id);
    return run?.name ?? id;
  });
  const kind = runs?.runs.find((one) => one.id === route.path[1])?.kind;
  if (kind === "evaluation" && crumbs[1]) crumbs[1][1] = link(["run", route.path[1] ?? "", "report"]);
  useKeys([
    { keys: ["?"], help: "this help", run: () => setHelp(true) },
    { keys: ["t"], help: "light, dark, or as the system", run: nextTheme },
    {
      keys: ["Escape", "u"], help: "up: to what this belongs to",
      run: () => {
        const up = [...crumbs].reverse().slice(1).find(([, href]) => href);
        if (up) location.hash = up[1];
      },
    },
  ]);
  const page = route.path.join("/");
  useEffect(() => {
    document.title = plain([...crumbs].reverse().slice(0, 2).map(([text]) => text).join(" · ").slice(0, 120)) + " · Polyturn";
  }, [page, runs]);
  const first = useRef(true);
  useEffect(() => {
    // Who reads by ear hears the view that a link led to; who opened the page is where the browser put them.
    if (first.current) first.current = false;
    else {
      main.current?.focus({ preventScroll: true });
      scrollTo(0, 0);
    }
  }, [page]);
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); main.current?.focus(); }}>
        To the content
      </a>
      <header class="top">
        <a class="brand" href="#/" aria-label="Polyturn, all runs">
          <svg viewBox="0 0 32 32" aria-hidden="true">
            <rect width="32" height="32" rx="7" fill="#1f4e79" />
            <g fill="none" stroke="#fff" stroke-width="2.6" stroke-linecap="round" stroke-linejoin="round">
              <path d="M8 9h7a5 5 0 0 1 0 10h-3" />
              <path d="M15 15l-4 4 4 4" />
              <path d="M21 9h3M21 19h3" />
            </g>
          </svg>
          Polyturn
        </a>
        <nav class="crumbs" aria-label="Where you are">
          <ol>
            {crumbs.map(([text, href], at) => (
              <li key={at}>
                {href && at < crumbs.length - 1 ? (
                  <a href={href}>
                    <Inline text={text} limit={60} />
                  </a>
                ) : (
                  <span aria-current="page">
                    <Inline text={text} limit={60} />
                  </span>
                )}
              </li>
            ))}
          </ol>
        </nav>
        <div class="tools">
          <button type="button" class="icon" onClick={nextTheme} aria-label={`Colours: ${theme}`} title={`Colours: ${theme} ( t )`}>
            {theme === "auto" ? "◐" : theme === "light" ? "○" : "●"}
          </button>
          <button type="button" class="icon" onClick={() => setHelp(true)} aria-label="Keys" title="Keys ( ? )">
            ?
          </button>
        </div>
      </header>
      <main id="main" ref={main} tabIndex={-1}>
        <Problems problems={exported()?.left_out ?? []} />
        <View route={route} />
      </main>
      {help && <Help close={() => setHelp(false)} />}
    </>
  );
}

const NAMES: Record<string, string> = { ArrowDown: "↓", ArrowUp: "↑", ArrowLeft: "←", ArrowRight: "→", Escape: "esc", Enter: "enter" };

function Help({ close }: { close: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [bindings] = useState(activeBindings);
  useEffect(() => dialog.current?.showModal(), []);
  useKeys([{ keys: ["Escape", "?"], help: "", always: true, run: close }]);
  return (
    <dialog ref={dialog} aria-label="Keys" onClose={close} onClick={(event) => event.target === dialog.current && close()}>
      <h2>Keys</h2>
      <dl>
        {bindings.map((binding, at) => (
          <>
            <dt key={at}>
              {binding.keys.map((key) => (
                <kbd key={key}>{NAMES[key] ?? key}</kbd>
              ))}
            </dt>
            <dd>{binding.help}</dd>
          </>
        ))}
      </dl>
      <button type="button" class="plain" onClick={close}>
        Close
      </button>
    </dialog>
  );
}

startTheme();
startKeyboard();
startLive();
const app = document.getElementById("app");
if (app) render(<App />, app);
