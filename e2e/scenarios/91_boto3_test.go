package scenarios

import (
	"slices"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/scenarios/first"
)

// boto3 asks as the pods' own programs do: its defaults are one second and one attempt. Its import takes many times as long as
// what is measured here.
const boto3 = `
import json, time, boto3
session = boto3.session.Session()
start = time.monotonic()
c = session.get_credentials()
took = int((time.monotonic() - start) * 1e9)
r = {"Kind": "ok", "AccessKeyID": c.access_key, "Role": c.method, "Took": took} if c else {"Kind": "status", "Step": "chain", "Text": "NoCredentials", "Took": took}
open("/dev/termination-log", "w").write(json.dumps(r))
`

// Thirty pods at once that do nothing but ask with the real boto3: all get their own.
func TestScenarioBoto3(t *testing.T) {
	s := beginScenario(t, 6*time.Minute)
	s.install()
	const ns, pods = "boto3", 30
	roles := []string{s.role("boto3/red"), s.role("boto3/green")}
	s.newNamespace(ns, allowed(roles...))
	s.serviceAccount(ns, "app0", roles[0])
	s.serviceAccount(ns, "app1", roles[1])
	b := first.Burst{Source: first.CNI, AtOnce: pods, Failures: map[string]int{}}
	found := s.burst(ns, 0, pods, func(p *podSpec, i int) {
		p.account, p.image, p.args = []string{"app0", "app1"}[i%2], "test.local/aws:1", []string{"python3", "-c", boto3}
	})
	for i, r := range found {
		s.count(&b, r, roles[i%2])
	}
	slices.Sort(b.Milliseconds)
	if b.Served != pods {
		t.Errorf("boto3 found its own role's credentials in %d of %d pods; the others: %v", b.Served, pods, b.Failures)
	}
	s.figures("boto3 in %d pods at once: %d served, %d wrong; get_credentials took %.0f ms at the median, %.0f ms at most",
		pods, b.Served, b.Wrong, b.Quantile(.5), b.Quantile(1))
	s.report(func(r *first.Report) { r.Boto3 = &b })
}
