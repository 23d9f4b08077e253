/** Where the reader is, as the hash of the address: every view is a link, the back button works, also from file://. */

import { useEffect, useState } from "preact/hooks";

export interface Route {
  /** The parts of the path, decoded. */
  path: string[];
  query: URLSearchParams;
}

export function readRoute(): Route {
  const hash = location.hash.replace(/^#\/?/, "");
  const mark = hash.indexOf("?");
  const path = mark < 0 ? hash : hash.slice(0, mark);
  return {
    path: path.split("/").filter(Boolean).map(decoded),
    query: new URLSearchParams(mark < 0 ? "" : hash.slice(mark + 1)),
  };
}

/** A part of a link that somebody mistyped stays as it is written. */
function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export type Query = Record<string, string | number | boolean | null | undefined>;

export function link(path: (string | number)[], query: Query | URLSearchParams = {}): string {
  const parameters =
    query instanceof URLSearchParams ? query : new URLSearchParams();
  if (!(query instanceof URLSearchParams)) {
    for (const [name, value] of Object.entries(query)) {
      if (value !== null && value !== undefined && value !== "" && value !== false) parameters.set(name, String(value));
    }
  }
  const tail = parameters.toString();
  return `#/${path.map((part) => encodeURIComponent(part)).join("/")}${tail ? `?${tail}` : ""}`;
}

export function go(path: (string | number)[], query: Query | URLSearchParams = {}): void {
  location.hash = link(path, query);
}

/** Changes parameters of this view: a link that can be sent, but no step of the back button. */
export function setQuery(changes: Query): void {
  const { path, query } = readRoute();
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "" || value === false) query.delete(name);
    else query.set(name, String(value));
  }
  history.replaceState(history.state, "", link(path, query));
  dispatchEvent(new HashChangeEvent("hashchange"));
}

export function useRoute(): Route {
  const [route, setRoute] = useState(readRoute);
  useEffect(() => {
    const changed = () => setRoute(readRoute());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return route;
}
