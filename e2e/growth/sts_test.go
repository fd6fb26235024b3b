package growth

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/bench/report"
)

// BenchmarkSTS lets the cache's own tests simulate a day of a node and the start of a whole cluster, with a clock that does not
// wait, and reports what they say.
func BenchmarkSTS(b *testing.B) {
	cmd := exec.CommandContext(b.Context(), "go", "test", "-count=1", "-v", "-run", "TestCallsOfADay|TestRollOutOfEveryNode|TestThunderingStart", "./cache", "-thunder-nodes", "5000")
	cmd.Dir = filepath.Join("..", "..")
	out, err := cmd.CombinedOutput()
	if err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	said := func(pattern string) []string {
		found := regexp.MustCompile(pattern).FindStringSubmatch(string(out))
		if found == nil {
			b.Fatalf("no %q in\n%s", pattern, out)
		}
		return found
	}
	day := said(`(\d+ calls for \d+ keys in a day): ([\d.]+) a key and hour`)
	start := said(`(5000 nodes .*requests a second): (\S+) at least; half of the keys after (\S+), all after (\S+); keys that a pod asks for: half after (\S+), all after (\S+); ([\d.]+) requests a key, ([\d.]+) of them throttled`)
	perHour, err := strconv.ParseFloat(day[2], 64)
	if err != nil {
		b.Fatal(err)
	}
	err = report.Add(reportDir, report.Section{
		ID: "sts", Title: "What STS is asked",
		Text: fmt.Sprintf("Simulated with the cache's own code and a clock that does not wait. The day has eight restarts and four updates in it (%s); a restart and a roll-out over "+
			"every node cost no call, or the simulation fails. The thundering start is one of all nodes at the same moment, none of which has anything kept, each with 30 keys and a pod that asks for one of "+
			"them every second. STS takes 600 requests a second per account and Region, AssumeRole among them "+
			"(https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html), answers after 50 ms and refuses the rest; the SDK tries a refused call once more. At -sts-rate 10 such a cluster may "+
			"ask for 50,000 a second; each daemon halves its rate when it is throttled. 5,000 nodes with 30 keys refresh 300,000 sessions an hour, 83 calls a second: 14 %% of the quota.\n\n"+
			"    go test ./cache -v -run 'TestCallsOfADay|TestRollOutOfEveryNode|TestThunderingStart' -thunder-nodes 5000", day[1]),
		Bars: []report.Bar{{What: "STS calls a key and hour, sessions of 1 h", Value: perHour, Max: 2.2}},
		Tables: []report.Table{{
			Title: start[1],
			Head:  []string{"by the quota alone", "half of the sessions after", "all after", "half of the pods that ask after", "all of them after", "requests a session", "of them throttled"},
			Rows:  [][]string{start[2:]},
		}},
	})
	if err != nil {
		b.Fatal(err)
	}
}
