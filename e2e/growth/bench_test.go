package growth

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/imdsgate/imdsgate/e2e/bench/report"
	"github.com/imdsgate/imdsgate/e2e/lab"
)

// reportDir is where `make bench` gathers its report.
var reportDir = filepath.Join("..", "out")

// What is changed while churn is measured.
const (
	churnTime    = time.Minute
	restTime     = 12 * time.Second // then: the daemon looks every ten at what it can give back
	churnNode    = 3 * time.Second  // between two pods of a node that are replaced
	churnCluster = 50               // changes a second of everything else
)

// BenchmarkCluster is the matrix: clusters of 1,000 to 20,000 pods, nodes of 10 to 250.
func BenchmarkCluster(b *testing.B) {
	sizes, counts := []size{1000, 5000, 20000}, []int{10, 50, 110, fullNode}
	c := &cluster{kube: shared.Kube}
	var nodes []*lab.Node
	var crowds []*crowd
	for _, pods := range counts {
		n, crowd := node(b, pods)
		nodes, crowds = append(nodes, n), append(crowds, crowd)
	}
	var samples []sample
	replaced := make([]int, len(counts))
	for _, size := range sizes {
		begun := time.Now()
		if err := c.grow(b.Context(), size); err != nil {
			b.Fatal(err)
		}
		b.Logf("%d pods in the cluster after %v", size, time.Since(begun).Round(time.Second))
		subjects, here := make([]*subject, len(counts)), make([]sample, len(counts))
		for i := range counts {
			subjects[i], here[i] = begin(b, nodes[i], crowds[i])
			here[i].size = size
		}
		ctx, cancel := context.WithTimeout(b.Context(), churnTime)
		var g errgroup.Group
		var changed int64
		g.Go(func() (err error) { changed, err = c.stir(ctx, churnCluster); return err })
		for i, s := range subjects {
			sent, received := s.relay.sent.Load(), s.relay.received.Load()
			g.Go(func() error {
				done, err := crowds[i].churn(ctx, churnNode, replaced[i])
				replaced[i] += done
				here[i].Replaced = done
				here[i].ChurnSent, here[i].ChurnReceived = s.relay.sent.Load()-sent, s.relay.received.Load()-received
				return err
			})
		}
		err := g.Wait()
		cancel()
		if err != nil {
			b.Fatal(err)
		}
		for i, s := range subjects {
			here[i].Changed = changed
			if here[i].Busy, err = s.footprint(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		time.Sleep(restTime)
		for i, s := range subjects {
			if here[i].Memory, err = s.footprint(b.Context()); err != nil {
				b.Fatal(err)
			}
			s.stop()
			b.Logf("%+v", here[i])
		}
		samples = append(samples, here...)
	}
	if err := report.Add(reportDir, clusterSection(sizes, counts, samples)); err != nil {
		b.Fatal(err)
	}
}

func clusterSection(sizes []size, counts []int, samples []sample) report.Section {
	of := func(s size, pods int) sample {
		return samples[slices.IndexFunc(samples, func(m sample) bool { return m.size == s && m.pods == pods })]
	}
	table := report.Table{Head: []string{
		"pods in the cluster", "service accounts", "pods on the node", "ready after", "RSS at rest", "of it anonymous", "RSS in churn", "highest since the start", "heap", "goroutines", "watches",
		"connections", "from the API server at the start", "to it", "from it in a minute of churn", "to it",
	}}
	for _, m := range samples {
		table.Rows = append(table.Rows, []string{
			fmt.Sprint(int(m.size)), fmt.Sprint(m.size.accounts()), fmt.Sprint(m.pods), m.Ready.Round(time.Millisecond).String(),
			mb(m.Memory.RSS), mb(m.Memory.Anonymous), mb(m.Busy.RSS), mb(m.Memory.Peak), mb(m.Memory.Heap), fmt.Sprint(m.Memory.Goroutines), fmt.Sprint(m.Watches), fmt.Sprint(m.Connections),
			kb(m.Received), kb(m.Sent), kb(m.ChurnReceived), kb(m.ChurnSent),
		})
	}
	rss := report.Plot{
		Name: "rss-over-cluster-size", Title: "Resident memory over the size of the cluster",
		X: report.Axis{Label: "pods in the cluster", Log: true}, Y: report.Axis{Label: "RSS in MB"},
	}
	for _, pods := range counts {
		line := report.Line{Name: fmt.Sprintf("%d pods on the node", pods)}
		for _, s := range sizes {
			line.Points = append(line.Points, report.Point{X: float64(s), Y: float64(of(s, pods).Memory.RSS) / 1e6})
		}
		rss.Lines = append(rss.Lines, line)
	}
	least, most := of(sizes[0], fullNode), of(sizes[len(sizes)-1], fullNode)
	ratio := func(what string, of func(sample) int64) report.Bar {
		return report.Bar{What: what + ", 20,000 pods in the cluster against 1,000", Value: float64(of(most)) / float64(of(least)), Max: 1.1, Unit: "×"}
	}
	bytes := ratio("bytes from the API server at the start and in a minute of churn", func(m sample) int64 { return m.Received + m.ChurnReceived })
	bytes.Note = "once a minute each watch gets a bookmark, 47 kB in all with 301 watches: in a minute of churn there may be one round more or less"
	return report.Section{
		ID: "growth", Title: "What one daemon costs, over the size of the cluster",
		Text: fmt.Sprintf("One daemon on a node of the lab, real etcd and kube-apiserver, every object made through the API. Each pod of the node has a service "+
			"account of its own, five share a namespace: the most that as many pods can cost. Bytes are those on the TCP connections to the API server, TLS included, "+
			"counted by a relay. Memory is that of /proc, %v after a minute of churn, and at its end: every %v a pod of each node is deleted and replaced, with the three status "+
			"updates of a kubelet, and other nodes' pods, service accounts and namespaces are changed %d times a second. What is not anonymous are pages of the program, clean and in the page cache all the same; the daemon "+
			"lets go of them 30 s after its start, and they come back as they are used.\n\n"+
			"    cd e2e && go test ./growth -run '^$' -bench Cluster -benchtime 1x", restTime, churnNode, churnCluster),
		Bars: []report.Bar{
			{What: "RSS with 250 pods on the node, 20,000 pods and 10,000 service accounts in the cluster", Value: float64(most.Memory.RSS) / 1e6, Max: maxRSS / 1e6, Unit: "MB"},
			{What: "the same at the end of a minute of churn", Value: float64(most.Busy.RSS) / 1e6, Max: maxRSS / 1e6, Unit: "MB"},
			ratio("RSS", func(m sample) int64 { return m.Memory.RSS }),
			ratio("bytes from the API server at the start", func(m sample) int64 { return m.Received }),
			bytes,
			ratio("watches", func(m sample) int64 { return int64(m.Watches) }),
		},
		Tables: []report.Table{table}, Plots: []report.Plot{rss},
	}
}

func mb(bytes int64) string { return fmt.Sprintf("%.1f MB", float64(bytes)/1e6) }
func kb(bytes int64) string { return fmt.Sprintf("%.0f kB", float64(bytes)/1e3) }
