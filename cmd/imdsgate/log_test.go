package main

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
)

// Nobody reads the log: whoever writes to it goes on, what fits is kept in order, and what was lost is said once somebody reads.
func TestLogThatNobodyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		q := newLineQueue()
		end := q.start(t.Context(), w, slog.New(slog.NewTextHandler(w, nil)))
		log := slog.New(slog.NewTextHandler(q, nil))
		const more = 100
		for i := range 1 + waitingLines + more { // the first is being written
			log.Info("line", "n", i)
			synctest.Wait()
		}
		end() // a second later, whether or not they are read

		got := make(chan string)
		go func() {
			all, _ := io.ReadAll(r)
			got <- string(all)
		}()
		synctest.Wait()
		w.Close()
		lines := strings.Split(strings.TrimSpace(<-got), "\n")
		var said []string
		for i, line := range lines {
			if strings.Contains(line, "were lost") {
				said = append(said, line)
			} else if n := i - len(said); !strings.HasSuffix(line, fmt.Sprintf("n=%d", n)) {
				t.Fatalf("line %d is %s", n, line)
			}
		}
		if len(lines) != 1+waitingLines+1 || len(said) != 1 || !strings.Contains(said[0], fmt.Sprintf("lines=%d", more)) {
			t.Errorf("%d lines, among them %q", len(lines), said)
		}
	})
}
