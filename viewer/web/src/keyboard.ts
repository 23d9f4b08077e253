/** Keys of the page. Each view binds its own while it is shown; the help lists those that hold. */

import { useEffect, useRef } from "preact/hooks";

export interface Binding {
  /** As `KeyboardEvent.key`. */
  keys: string[];
  /** What it does, for the help; empty: another binding says it. */
  help: string;
  /** false: it is not for this binding now, and goes to those under it. */
  run: () => void | false;
  /** Also where the reader is typing. */
  always?: boolean;
}

let layers: { current: Binding[] }[] = [];

export function activeBindings(): Binding[] {
  return layers.flatMap((layer) => layer.current).filter((binding) => binding.help);
}

function typing(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && target.matches("input:not([type=range]):not([type=checkbox]), textarea, select");
}

/** What the focused element does with a key by itself. */
function ownUse(event: KeyboardEvent): boolean {
  const target = event.target;
  if (!(target instanceof HTMLElement)) return false;
  if (event.key === "Enter" || event.key === " ") return target.matches("a, button, summary, input");
  return event.key.startsWith("Arrow") && target.matches("input[type=range]");
}

export function startKeyboard(): void {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || ownUse(event)) return;
    const inText = typing(event.target);
    // The last that was bound comes first: an open dialog before the view under it.
    for (const layer of [...layers].reverse()) {
      const binding = layer.current.find((one) => one.keys.includes(event.key) && (one.always || !inText));
      if (binding && binding.run() !== false) {
        event.preventDefault();
        return;
      }
    }
  });
}

export function useKeys(bindings: Binding[]): void {
  const layer = useRef(bindings);
  layer.current = bindings;
  useEffect(() => {
    layers = [...layers, layer];
    return () => {
      layers = layers.filter((one) => one !== layer);
    };
  }, []);
}
