package hostile

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

var (
	statusLine = regexp.MustCompile(`HTTP/1\.[01] (\d{3}) `)
	never      = regexp.MustCompile(`HTTP/1\.[01] [23]\d\d |(?i)\r\nlocation:|\r\ntransfer-encoding:`)
)

// Thousands of requests that somebody has used against a metadata endpoint, a proxy or a filter, from a pod with a role and,
// over IPv6, from one without: no answer holds credentials but the pod's own, nothing that nobody may have is a 200, nothing is a
// redirect, every connection ends, and at the real endpoint is no request that the table did not build. (S6, S7, S8, S11;
// CVE-2022-23551 is among the paths)
func TestHostileRequests(t *testing.T) {
	s := newStage(t, lab.NodeOptions{})
	requests := Requests(Names{
		Own: "mallory-role", OwnPath: "team/mallory-role", Other: "victim-role", Node: lab.NodeRole,
		OtherIP: s.victim.IPs[0].String(), NodeIP: s.IP.String(),
	})
	t.Logf("%d requests", len(requests))
	if len(requests) < 3000 {
		t.Errorf("the corpus has %d requests", len(requests))
	}
	for name, p := range map[string]*lab.Pod{"with a role": s.mallory, "without": s.none} {
		to := endpoint
		if p == s.none {
			to = endpoint6
		}
		work := make(chan Request)
		var workers sync.WaitGroup
		var mu sync.Mutex
		statuses, failed := map[string]int{}, 0
		fail := func(r Request, answer string, err error) {
			mu.Lock()
			defer mu.Unlock()
			if failed++; failed <= 20 {
				t.Errorf("%s: %s: %v\n%.600q\nis answered\n%.600q", name, r.Name, err, r.Raw, answer)
			}
		}
		for range 6 {
			workers.Go(func() {
				for r := range work {
					answer, err := speak(t.Context(), p, to, r.Raw)
					if err != nil && !errors.Is(err, syscall.ECONNRESET) {
						fail(r, answer, err)
						continue
					}
					if err := s.stolen(p, answer); err != nil {
						fail(r, answer, err)
					}
					if p == s.none && accessKeys.MatchString(answer) {
						fail(r, answer, errors.New("credentials for a pod without a role"))
					}
					bad := never.FindString(answer)
					if bad != "" && !(r.Served && strings.HasSuffix(bad, " 200 ")) && !strings.HasSuffix(bad, " 100 ") {
						fail(r, answer, fmt.Errorf("must not be answered %q", bad))
					}
					mu.Lock()
					for _, m := range statusLine.FindAllStringSubmatch(answer, -1) {
						statuses[m[1]]++
					}
					mu.Unlock()
				}
			})
		}
		for _, r := range requests {
			work <- r
		}
		close(work)
		workers.Wait()
		t.Logf("a pod %s is answered %v", name, statuses)
		for _, status := range []string{"200", "400", "403", "404", "405", "401", "501", "505"} {
			if statuses[status] == 0 {
				t.Errorf("no request of a pod %s was answered %s: the corpus does not reach what it should", name, status)
			}
		}
		if failed > 20 {
			t.Errorf("%d failures in all", failed)
		}
	}
	for _, p := range []*lab.Pod{s.mallory, s.victim} {
		if err := s.own(labtest.Context(t), p); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
	s.untouched(t)
}
