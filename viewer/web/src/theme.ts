/** Dark or light: as the system says, until the reader chooses. */

import { useEffect, useState } from "preact/hooks";

export type Theme = "auto" | "light" | "dark";

const KEY = "polyturn-theme";
const ORDER: Theme[] = ["auto", "light", "dark"];

function kept(): Theme {
  try {
    const value = localStorage.getItem(KEY);
    return value === "light" || value === "dark" ? value : "auto";
  } catch {
    return "auto"; // Storage can be closed to a page, and is to some opened from a file.
  }
}

function apply(theme: Theme): void {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  dispatchEvent(new Event("themechange"));
}

export function startTheme(): void {
  apply(kept());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("themechange")));
}

export function useTheme(): [Theme, () => void] {
  const [theme, setTheme] = useState<Theme>(kept);
  const next = () => {
    const chosen = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length] as Theme;
    try {
      localStorage.setItem(KEY, chosen);
    } catch {
      // The choice then holds for as long as the page is open.
    }
    apply(chosen);
    setTheme(chosen);
  };
  return [theme, next];
}

/** Counts changes of the theme: what is drawn on a canvas is drawn anew when it changes. */
export function useThemeChanges(): number {
  const [count, setCount] = useState(0);
  useEffect(() => {
    const changed = () => setCount((before) => before + 1);
    addEventListener("themechange", changed);
    return () => removeEventListener("themechange", changed);
  }, []);
  return count;
}

/** A colour of the style sheet as a canvas takes it: what `light-dark()` comes to is known of an element alone. */
export function cssColor(name: string): string {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`;
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}
