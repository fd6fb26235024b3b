package sts

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Values of the label code beside STS's own codes.
const (
	codeOK          = "OK"
	codeTimeout     = "timeout"     // no answer in time
	codeUnreachable = "unreachable" // no connection
	codeOther       = "other"
)

// knownCode tells the error codes of STS that become label values: a server must not make up series.
func knownCode(code string) bool {
	switch code {
	case "AccessDenied", "ExpiredToken", "ExpiredTokenException", "IDPCommunicationError", "IDPRejectedClaim",
		"IncompleteSignature", "InternalFailure", "InvalidClientTokenId", "InvalidIdentityToken", "MalformedPolicyDocument",
		"MissingAuthenticationToken", "PackedPolicyTooLarge", "RegionDisabledException", "RequestExpired",
		"RequestLimitExceeded", "ServiceUnavailable", "SignatureDoesNotMatch", "Throttling", "ThrottlingException",
		"ValidationError":
		return true
	}
	return false
}

type metrics struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

func newMetrics(r prometheus.Registerer) (metrics, error) {
	m := metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "imdsgate_sts_requests_total",
			Help: "Calls of STS by operation and result: OK, STS's error code, timeout, unreachable or other.",
		}, []string{"operation", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "imdsgate_sts_request_duration_seconds",
			Help: "Duration of calls of STS, the SDK's retries included.",
			// STS answers in 20 to 200 ms; a call ends within 10 s.
			Buckets:                        []float64{.01, .02, .05, .1, .2, .5, 1, 2, 5, 10},
			NativeHistogramBucketFactor:    1.1,
			NativeHistogramMaxBucketNumber: 100,
		}, []string{"operation"}),
	}
	if r == nil {
		return m, nil
	}
	return m, errors.Join(r.Register(m.requests), r.Register(m.duration))
}

// observe counts a call, all its attempts as one.
func (s *STS) observe(operation string, call func() error) error {
	start := time.Now()
	err := call()
	s.metrics.duration.WithLabelValues(operation).Observe(time.Since(start).Seconds())
	s.metrics.requests.WithLabelValues(operation, codeLabel(err)).Inc()
	return err
}
